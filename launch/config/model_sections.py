"""Model sections: network, objective, sampling, previews."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from launch.config.section import Section, Share, check_interval
from launch.config.yaml_file import ConfigConflict
from tim.model_kinds import Derivative, Dtype, NewCondition, RopeLayout, TeacherKind, TransportKind, Weighting

LORA_TARGETS = ("blocks.*.attn.*", "blocks.*.cross_attn.*", "blocks.*.mlp.*")


class NetworkParams(Section):
    """Parameters of the network, named as in the published TiM configs (`network.params`)."""

    patch_size: int = Field(default=1, ge=1)
    """Latent cells per side of a token."""
    in_channels: int | None = None
    """Latent channels; null: taken from the codec."""
    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    num_heads: int = Field(ge=1)
    cap_feat_dim: int | None = Field(default=None, ge=1)
    """Width of the caption features of a text model; null: 512."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of classes of a class model; null: 1000."""
    class_dropout_prob: Share | None = None
    """Share of images trained without their class, for classifier-free guidance; null: 0.1."""
    input_size: int = Field(default=32, ge=1)
    encoder_depth: int = Field(default=8, ge=1)
    """The alignment projection reads the output of this block."""
    z_dim: int = Field(default=0, ge=0)
    """Output width of the alignment projection; 0: no projection."""
    projector_dim: int = Field(default=2048, ge=1)
    lora_hidden_size: int = Field(default=0, ge=0)
    """Rank of the modulation layers; 0: three quarters of hidden_size."""
    qk_norm: bool = True
    distance_aware: bool = True
    new_condition: NewCondition = "t-r"
    """Times from which the embedding of the transition length is computed."""
    use_new_embed: bool = True
    """Use a separate embedder for the last of these times."""

    @model_validator(mode="after")
    def _heads_fit(self) -> NetworkParams:
        head_width, rest = divmod(self.hidden_size, self.num_heads)
        if rest or head_width % 4:
            raise ConfigConflict(
                "num_heads", f"hidden_size {self.hidden_size} over {self.num_heads} heads: a head's width must be a multiple of 4"
            )
        return self


class NetworkConfig(Section):
    recipe: str | None = None
    """A recipe to take `network.params` from; `params` given here override it. Without alignment its projection is omitted."""
    params: NetworkParams
    rope: RopeLayout = "rowcol"
    """Rotary layout: positions count from the image corner (rowcol) or centre (centred); `legacy` is only for published weights."""


class GuidanceConfig(Section):
    """Guidance in the training target, by the EMA network F: v becomes w_gt·v + w_cond·F(c) + (1 − w_gt − w_cond)·F(∅)."""

    w_gt: float = 1.0
    """Weight of the ground-truth target v."""
    w_cond: float = 0.75
    """Weight of the conditional prediction F(c). With w_gt 1, the trained-in guidance scale is 1 + w_cond."""
    interval: tuple[Share, Share] = (0.3, 0.8)
    """Times at which guidance acts, as shares of the transport's start; ends included."""
    after: int = Field(default=0, ge=0)
    """Number of first steps without guidance; published: 100,000."""
    refresh: int = Field(default=100, ge=1)
    """Steps between updates of each rank's copy of the EMA network."""

    @model_validator(mode="after")
    def _interval_fits(self) -> GuidanceConfig:
        check_interval(self.interval)
        return self


class AlignmentConfig(Section):
    """Representation alignment: align the features after block `encoder_depth` with those of a frozen vision transformer."""

    kind: TeacherKind
    path: Annotated[Path, Field(strict=False)] | None = None
    """Weights of the teacher: RADIO's file, or a transformers or open_clip folder. Required unless its features are precomputed."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the alignment loss."""


TRANSPORT_SETTINGS = {"time_mean": "mean", "time_std": "std", "sigma_d": "sigma_d"}  # config key → argument of `transports.make`


class ObjectiveConfig(Section):
    transport: TransportKind = "ot_fm"
    """Interpolation between image and noise over time."""
    derivative: Derivative = "finite-difference"
    """Derivative of the network along the path: finite difference of two evaluations, or exact forward-mode differentiation (jvp)."""
    derivative_precision: Dtype | None = None
    """Precision of the derivative; null: fp16 on a GPU, fp32 on the CPU. A pack that overflows in fp16 is repeated in fp32. In bf16 a
    finite difference is mostly rounding noise."""
    epsilon: float | None = Field(default=None, gt=0, lt=0.5)
    """Half the interval of the finite difference; null: 0.005 in fp32, 0.02 in fp16, 0.05 in bf16."""
    diffusion_share: Share = 0.5
    """Share of images trained with r = t; `plan.schedule` can change it at given steps."""
    consistency_share: Share = 0.1
    """Share of images trained with r = 0; the rest has r < t. `plan.schedule` can change it at given steps."""
    time_mean: float | None = None
    """Mean of the normal distribution of training times; null: 0 for ot_fm and trigflow, -1.2 for edm."""
    time_std: float | None = Field(default=None, gt=0)
    """Standard deviation of that distribution; null: 1.6 for ot_fm and trigflow, 1.2 for edm."""
    sigma_d: float | None = Field(default=None, gt=0)
    """Standard deviation of the latents, for edm; null: 0.5."""
    weighting: Weighting = "tangent"
    """Loss weight of an image as a function of t and r."""
    guidance: GuidanceConfig | None = None
    """Guidance in the training target; null: none."""
    alignment: AlignmentConfig | None = None
    """Representation alignment with a teacher; null: none."""
    shift: int | None = Field(default=1024, ge=1)
    """Reference side in pixels for shifting times with resolution; null: no shift. Only ot_fm and trigflow support it."""

    @model_validator(mode="after")
    def _shares_fit(self) -> ObjectiveConfig:
        total = self.diffusion_share + self.consistency_share
        if total > 1 + 1e-9:
            raise ConfigConflict("consistency_share", f"diffusion_share and consistency_share add up to {total:g}, more than 1")
        return self

    def transport_settings(self) -> dict[str, float]:
        """Settings for `transports.make`: those that are not null."""
        given = {name: getattr(self, key) for key, name in TRANSPORT_SETTINGS.items()}
        return {name: value for name, value in given.items() if value is not None}


class SamplingConfig(Section):
    """Sampling defaults that are written into the model folder."""

    steps: int = Field(default=8, ge=1)
    """Number of sampling steps."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; null: 2.5 as in the published evaluations, or 1 if no captions were dropped in training."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """Times at which guidance acts, as shares of the transport's start; ends included, so [0, 1] also guides a single step."""
    shift: int | None = Field(default=None, ge=1)
    """Reference side in pixels for shifting the sampler's times; null: that of the objective."""

    @model_validator(mode="after")
    def _interval_fits(self) -> SamplingConfig:
        check_interval(self.interval)
        return self


class PreviewConfig(Section):
    """Images drawn while training, at the same steps for any number of ranks: every prompt at every size in every number of steps."""

    every: int = Field(default=500, ge=1)
    """Steps between previews; another one is drawn at the end."""
    prompts: tuple[int | str, ...] = ()
    """Prompts, or classes of a class model; empty: no previews."""
    sizes: tuple[str, ...] = ()
    """Sizes as WIDTHxHEIGHT in pixels; empty: the largest square that `plan` allows."""
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 8), min_length=1)
    """Numbers of sampling steps."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; null: that of the model (`sampling.guidance`)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial noise, the same in every preview."""
    minutes: float = Field(default=5.0, gt=0)
    """Time for one preview. Images that would exceed it are left out, those with the most steps and pixels first."""

    @property
    def pixel_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths of the resolved section."""
        return [(int(height), int(width)) for width, height in (re.split("[xX×]", size) for size in self.sizes)]


class LoraConfig(Section):
    rank: int = Field(default=16, ge=1)
    """Rank of the adapters (LoRA, arXiv 2106.09685)."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the adapters: they change a matrix by alpha/rank · B·A. null: the rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LORA_TARGETS
    """Patterns of the linear layers that get an adapter, with `*`: full names, or their ends such as `attn.qkv`. Default: the matrices of
    attention and MLP in all blocks."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each adapter's input channels that a step leaves out. Drawn from the seed, the step and the layer, and equal for all
    images of a step, so that neither ranks nor ZeRO stage affect it."""

    @property
    def strength(self) -> float:
        """`alpha`, or its default."""
        return float(self.rank) if self.alpha is None else self.alpha
