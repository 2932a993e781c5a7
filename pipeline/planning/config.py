"""The `plan` section of a config: the content of a step, and its schedule."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pipeline.cost import KIND_FACTORS
from pipeline.size_rule import Fit, SizeRule

Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

_CHANGES = ("max_tokens", "packs_per_step", "weights", "diffusion_share", "consistency_share")  # keys of a stage


class Stage(BaseModel):
    """Changes of the plan from optimizer step `step` on (the first is step 0). Omitted keys keep their previous values.

    `weights` maps all corpus names to weights; 0 pauses a corpus. `diffusion_share` and `consistency_share` are the shares of images with
    r = t and with r = 0; their initial values are in `objective`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    packs_per_step: int | None = Field(default=None, ge=1)
    weights: dict[str, Weight] | None = None
    diffusion_share: Share | None = None
    consistency_share: Share | None = None

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if all(getattr(self, key) is None for key in _CHANGES):
            raise ValueError(f"step {self.step} changes nothing: give {', '.join(_CHANGES[:-1])} or {_CHANGES[-1]}")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("weights are all 0: at least one must be above 0")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_shares(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit unset shares, so that the hash of a plan without them does not change."""
        return {key: value for key, value in serialize(self).items() if value is not None or not key.endswith("_share")}


class SizeLimits(BaseModel):
    """The limits of the native-size rule that do not change from stage to stage (`pipeline.size_rule.SizeRule`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pixels: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=1, ge=1)
    max_aspect: float = Field(default=8.0, ge=1)
    fit: Fit = "crop"

    def rule(self, *, stride: int, max_tokens: int) -> SizeRule:
        limits = {name: getattr(self, name) for name in SizeLimits.model_fields}
        return SizeRule(stride=stride, max_tokens=max_tokens, **limits)


class PlanConfig(SizeLimits):
    """The `plan` section of a config. `stride` (pixels per token side) follows from the codec and the network; lengths are in tokens.

    `window` shards are shuffled together. `groups` is the number of groups that the shards and the packs of a step are split into, so that
    cluster nodes share the downloads: ranks read only the shards of their part, and there are gcd(groups, ranks) parts. `gamma` weights the
    quadratic part of an image's cost, `cost_factors` are the relative costs of images with r = t, r = 0 and r < t (`tim bench attention
    --fit` measures both on a device); `flip` is the share of mirrored images; `schedule` lists changes by step.
    """

    stride: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    tokens_per_pack: int = Field(default=4096, ge=1)
    packs_per_step: int = Field(default=8, ge=1)
    window: int = Field(default=8, ge=1)
    groups: int = Field(default=1, ge=1)
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    cost_factors: tuple[Factor, Factor, Factor] = KIND_FACTORS
    flip: float = Field(default=0.0, ge=0, le=1)
    schedule: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> PlanConfig:
        limits = {"plan.max_tokens": self.max_tokens}
        packs = {"plan.packs_per_step": self.packs_per_step}
        for number, (stage, before) in enumerate(zip(self.schedule, (None, *self.schedule), strict=False)):
            if before is not None and stage.step <= before.step:
                raise ValueError(f"plan.schedule: step {stage.step} comes after step {before.step}: sort the stages by step")
            if stage.max_tokens is not None:
                limits[f"plan.schedule.{number}.max_tokens"] = stage.max_tokens
            if stage.packs_per_step is not None:
                packs[f"plan.schedule.{number}.packs_per_step"] = stage.packs_per_step
        for key, count in packs.items():
            if count % self.groups:
                raise ValueError(
                    f"{key} {count} is not a multiple of plan.groups {self.groups}: every group needs the same number of packs"
                )
        for key, max_tokens in limits.items():
            if max_tokens > self.tokens_per_pack:
                raise ValueError(
                    f"{key} {max_tokens} is more than plan.tokens_per_pack {self.tokens_per_pack}: the largest image must fit into a pack, "
                    "lower the first or raise the second"
                )
            if self.min_tokens > max_tokens:
                raise ValueError(f"plan.min_tokens {self.min_tokens} is more than {key} {max_tokens}: no image could be trained")
        return self

    def at(self, step: int) -> PlanConfig:
        """The plan in an optimizer step."""
        changed = {}
        for stage in self.schedule:
            if stage.step <= step:
                changed |= stage.model_dump(include={"max_tokens", "packs_per_step"}, exclude_none=True)
        return self.model_copy(update=changed)

    def weights_at(self, step: int) -> dict[str, float] | None:
        """Weights by corpus name in an optimizer step, None before the schedule sets any."""
        scheduled = [stage.weights for stage in self.schedule if stage.step <= step and stage.weights is not None]
        return scheduled[-1] if scheduled else None

    def kind_shares_at(self, step: int, *, first: tuple[float, float]) -> tuple[float, float]:
        """Shares of images with r = t and with r = 0 in an optimizer step; `first` are the initial shares."""
        diffusion, consistency = first
        for stage in self.schedule:
            if stage.step <= step:
                diffusion = diffusion if stage.diffusion_share is None else stage.diffusion_share
                consistency = consistency if stage.consistency_share is None else stage.consistency_share
        return diffusion, consistency

    @property
    def max_packs_per_step(self) -> int:
        """The largest `packs_per_step` of all stages."""
        return max([self.packs_per_step, *[stage.packs_per_step or 0 for stage in self.schedule]])

    @property
    def size_rule(self) -> SizeRule:
        """The native-size rule. The stride must be known."""
        assert self.stride is not None
        return self.rule(stride=self.stride, max_tokens=self.max_tokens)
