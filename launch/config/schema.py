"""The configuration of a training run: one YAML file, strict.

Validation is pure: it imports no torch, touches neither disk nor network and changes nothing. `launch.config.resolve` fills in
what follows from the codec, the condition and the transport.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from launch.config import yaml_file
from launch.config.data_sections import CodecConfig, CorpusConfig, LoaderConfig, TextConfig, as_corpora
from launch.config.model_sections import NetworkConfig, ObjectiveConfig, SamplingConfig
from launch.config.section import Section
from launch.config.yaml_file import ConfigConflict, ConfigError
from pipeline.planning.config import PlanConfig
from tim.kinds import AttentionChoice, Precision

__all__ = ["Config", "ConfigError", "TextConfig", "TrainConfig", "digest", "to_yaml"]


class TrainConfig(Section):
    steps: int = Field(ge=1)
    lr: float = Field(default=1e-4, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Steps in which the learning rate grows linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up; cosine ends at 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the blocks' matrices take orthogonalised steps, of the size that AdamW's have; far fewer steps are needed. ZeRO 1 and 2."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices; biases and gains do not decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    precision: Precision = "fp32"
    """bf16: autocast; weights and gradient sums stay in float32."""
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage; a run can go on with another, as with another number of processes."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of a step's gradient; 0: no limit."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the averaged weights, which the model folder holds."""
    attention: AttentionChoice = "auto"
    """Implementation of attention in the training pass; auto takes the fastest that the device has."""
    checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] = "none"
    """Blocks whose activations are computed again instead of kept: none, all, or every n-th. Less memory, up to a third more time."""
    compile: bool = False
    """Fuse the blocks' norms and MLPs by torch.compile; for GPUs. The first steps take minutes."""
    init: str | None = None
    """Weights that a new run begins with: a model folder, a run (its averaged weights), a file of published weights, or hf://OWNER/NAME.
    A run that is resumed does not load them again."""
    init_strict: bool = True
    """Refuse weights of another network; false: load what fits by name and shape, and say what was not loaded."""

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.warmup > self.steps:
            raise ConfigConflict("warmup", f"{self.warmup} steps of warm-up do not fit into {self.steps} steps")
        if self.optimizer == "muon" and self.zero == 3:
            raise ConfigConflict("optimizer", "muon needs whole matrices, which train.zero=3 cuts up: use zero 1 or 2, or adamw")
        if self.compile and self.zero == 3:
            raise ConfigConflict("compile", "train.zero=3 gathers weights inside the compiled blocks: use zero 1 or 2, or no compile")
        return self

    @property
    def lockstep(self) -> bool:
        """Whether ranks wait for each other in every pack: ZeRO-2 sums gradients in every backward pass, ZeRO-3 gathers every layer."""
        return self.zero >= 2


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints; one is written at the end, too."""
    keep_last: int = Field(default=2, ge=1)


class LogConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl."""


class Config(Section):
    corpus: Annotated[tuple[CorpusConfig, ...], BeforeValidator(as_corpora)] = ()
    """A path, or a list of {path, name, features, weight, repeats, cap, where, exclude}."""
    run_dir: Path | None = None
    """Where the run writes; a run that is there already is resumed."""
    seed: int = Field(default=0, ge=0)
    condition: Literal["text", "class"] = "text"
    """What images are asked for by: their captions, or the classes that the corpus says (`KEY.cls`)."""
    plan: PlanConfig = PlanConfig()
    codec: CodecConfig = CodecConfig()
    text: TextConfig = TextConfig()
    network: NetworkConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _scheduled_shares_fit(self) -> Config:
        for number, (diffusion, consistency) in enumerate(self.kind_shares()[1:]):
            if diffusion + consistency > 1 + 1e-9:
                why = f"from step {self.plan.schedule[number].step} on diffusion_share {diffusion:g} and consistency_share {consistency:g}"
                raise ConfigConflict(f"plan.schedule.{number}", f"{why} add up to more than 1")
        return self

    @model_validator(mode="after")
    def _derivative_fits(self) -> Config:
        if self.objective.derivative == "jvp" and self.train.zero == 3:
            why = "jvp needs whole weights, which train.zero=3 cuts up (DeepSpeed's gathering has no forward-mode derivative)"
            raise ConfigConflict("objective.derivative", f"{why}: use zero 1 or 2, or finite-difference")
        if self.objective.derivative == "jvp" and self.train.attention not in ("auto", "sdpa"):
            raise ConfigConflict(
                "train.attention", f"{self.train.attention} has no forward-mode derivative, which jvp needs: use auto or sdpa"
            )
        return self

    def kind_shares(self, *, before: int | None = None) -> list[tuple[float, float]]:
        """Shares of images with r = t and with r = 0: those of the first step, then those of each stage that begins `before` a step."""
        first = self.objective.diffusion_share, self.objective.consistency_share
        stages = [0, *(stage.step for stage in self.plan.schedule if before is None or stage.step < before)]
        return [self.plan.kind_shares_at(step, first=first) for step in stages]

    @property
    def condition_dropout(self) -> float:
        """Share of images that are trained without their caption or class."""
        return self.text.caption_dropout if self.condition == "text" else self.network.params.class_dropout_prob or 0.0


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration: every key, defaults filled in."""
    return yaml_file.dump(config)


def digest(config: BaseModel) -> str:
    """Hash of the resolved configuration."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]
