"""Sections about the model: network, objective, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from launch.config.section import Section, Share, check_interval
from launch.config.yaml_file import ConfigConflict
from tim.kinds import Derivative, NewCondition, Precision, RopeLayout, TeacherKind, TransportKind, Weighting


class NetworkParams(Section):
    """The published names (`network.params` of the TiM configs)."""

    patch_size: int = Field(default=1, ge=1)
    """Latent cells per side of a token."""
    in_channels: int | None = None
    """Latent channels: follows from the codec."""
    depth: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    num_heads: int = Field(ge=1)
    cap_feat_dim: int | None = Field(default=None, ge=1)
    """Width of the caption features of a text model; null: 512."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of classes of a class model; null: 1000."""
    class_dropout_prob: Share | None = None
    """Share of images that a class model sees without their class, for guidance; null: 0.1."""
    input_size: int = Field(default=32, ge=1)
    encoder_depth: int = Field(default=8, ge=1)
    """Block after which the projection for representation alignment branches off."""
    z_dim: int = Field(default=0, ge=0)
    """Width of that projection; 0: there is none."""
    projector_dim: int = Field(default=2048, ge=1)
    lora_hidden_size: int = Field(default=0, ge=0)
    """Rank of the modulation layers; 0: three quarters of hidden_size."""
    qk_norm: bool = True
    distance_aware: bool = True
    new_condition: NewCondition = "t-r"
    """Which times the embedding of a transition's length is made of."""
    use_new_embed: bool = True
    """Whether the last of them has an embedder of its own."""

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
    """A recipe to take `network.params` from; what `params` says here replaces its own. Without alignment its projection is left out."""
    params: NetworkParams
    rope: RopeLayout = "rowcol"
    """Rotary layout: positions count from the corner or the middle of an image; `legacy` only for the published weights."""


class GuidanceConfig(Section):
    """Guidance in the target, by the averaged network: v becomes w_gt·v + w_cond·F(c) + (1 − w_gt − w_cond)·F(∅)."""

    w_gt: float = 1.0
    w_cond: float = 0.75
    """With w_gt 1, a guidance scale of 1 + w_cond is trained in."""
    interval: tuple[Share, Share] = (0.3, 0.8)
    """Times at which it acts, as shares of the transport's start; ends included."""
    after: int = Field(default=0, ge=0)
    """Steps that are trained without it; 100,000 as published."""
    refresh: int = Field(default=100, ge=1)
    """Steps between fillings of the copy of the averaged network that each rank holds."""

    @model_validator(mode="after")
    def _interval_fits(self) -> GuidanceConfig:
        check_interval(self.interval)
        return self


class AlignmentConfig(Section):
    """Alignment of the network's features after block `encoder_depth` with those of a frozen vision transformer."""

    kind: TeacherKind
    path: Annotated[Path, Field(strict=False)] | None = None
    """Its weights: RADIO's file, or a folder that transformers or open_clip reads. Training needs them."""
    weight: float = Field(default=1.0, ge=0)


TRANSPORT_SETTINGS = {"time_mean": "mean", "time_std": "std", "sigma_d": "sigma_d"}  # of this section → of `transports.make`


class ObjectiveConfig(Section):
    transport: TransportKind = "ot_fm"
    """How noise and image mix over time."""
    derivative: Derivative = "finite-difference"
    """How the network's derivative along the path is found: from two evaluations, or exactly, by forward-mode differentiation."""
    derivative_precision: Precision = "fp32"
    """In bf16 a finite difference is mostly rounding noise."""
    epsilon: float = Field(default=0.005, gt=0, lt=0.5)
    """Half the interval of the finite difference."""
    diffusion_share: Share = 0.5
    """Share of images trained with r = t; `plan.schedule` can change it at a step."""
    consistency_share: Share = 0.1
    """Share of images trained with r = 0; the rest has r < t. `plan.schedule` can change it at a step."""
    time_mean: float | None = None
    time_std: float | None = Field(default=None, gt=0)
    """Mean and deviation of the normal law behind the times of ot_fm, trigflow (null: 0 and 1.6) and edm (null: -1.2 and 1.2)."""
    sigma_d: float | None = Field(default=None, gt=0)
    """Standard deviation of the latents, for edm; null: 0.5."""
    weighting: Weighting = "tangent"
    """How an image's loss is weighted by t and r."""
    guidance: GuidanceConfig | None = None
    """Guidance in the target; null: none."""
    alignment: AlignmentConfig | None = None
    """A teacher whose features the network's are aligned with; null: none."""
    shift: int | None = Field(default=1024, ge=1)
    """Times shift with resolution, by this reference side in pixels; null: they do not. Only ot_fm and trigflow can."""

    @model_validator(mode="after")
    def _shares_fit(self) -> ObjectiveConfig:
        total = self.diffusion_share + self.consistency_share
        if total > 1 + 1e-9:
            raise ConfigConflict("consistency_share", f"diffusion_share and consistency_share add up to {total:g}, more than 1")
        return self

    def transport_settings(self) -> dict[str, float]:
        """What `transports.make` is to be told."""
        given = {name: getattr(self, key) for key, name in TRANSPORT_SETTINGS.items()}
        return {name: value for name, value in given.items() if value is not None}


class SamplingConfig(Section):
    """What the model folder says by default."""

    steps: int = Field(default=8, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; null: 2.5 as in the published evaluations, or 1 if training dropped no captions."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """Times at which guidance acts, as shares of the transport's start; ends included, so that [0, 1] guides a single step, too."""
    shift: int | None = Field(default=None, ge=1)
    """Reference side in pixels of the shift of the sampler's times; null: that of the objective."""

    @model_validator(mode="after")
    def _interval_fits(self) -> SamplingConfig:
        check_interval(self.interval)
        return self
