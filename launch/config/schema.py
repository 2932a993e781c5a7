"""Schema of a training run's configuration: one YAML file, strictly validated.

Validation has no side effects: it does not import torch or access disk or network. `launch.config.resolve` fills in the values derived
from the codec, the condition and the transport.
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
    """Total number of steps."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after the warm-up."""
    warmup: int = Field(default=0, ge=0)
    """Number of steps in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine decay to 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised updates for the blocks' matrices, scaled like AdamW's; needs far fewer steps. Requires ZeRO 1 or 2."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices; biases and gains do not decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's coefficients for the running averages of the gradient and its square."""
    precision: Precision = "fp32"
    """bf16: autocast; weights and gradient accumulation stay in float32."""
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage; a run can resume with another stage or another number of processes."""
    clip: float = Field(default=1.0, ge=0)
    """Gradient clipping: largest gradient norm of a step; 0: no clipping."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights; the model folder holds the average."""
    attention: AttentionChoice = "auto"
    """Attention backend for training; auto: the fastest available on the device."""
    checkpointing: Literal["none", "full"] | Annotated[int, Field(ge=1)] = "none"
    """Activation checkpointing of blocks: none, full (all), or every n-th. Saves memory for up to a third more time."""
    compile: bool = False
    """Compile the blocks' norms and MLPs with torch.compile, for GPUs. The first steps take minutes."""
    init: str | None = None
    """Initial weights of a new run: a model folder, a run (its EMA weights), a file of published weights, or hf://OWNER/NAME. Ignored
    when a run is resumed."""
    init_strict: bool = True
    """Reject weights of another network; false: load the tensors that match by name and shape, and report the others."""

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.warmup > self.steps:
            raise ConfigConflict("warmup", f"{self.warmup} warm-up steps exceed the {self.steps} steps of the run")
        if self.optimizer == "muon" and self.zero == 3:
            raise ConfigConflict("optimizer", "muon needs whole matrices, but train.zero=3 shards them: use zero 1 or 2, or adamw")
        if self.compile and self.zero == 3:
            raise ConfigConflict("compile", "train.zero=3 gathers weights inside the compiled blocks: use zero 1 or 2, or compile=false")
        return self

    @property
    def lockstep(self) -> bool:
        """Whether ranks synchronise in every pack: ZeRO-2 reduces gradients in every backward pass, ZeRO-3 gathers every layer."""
        return self.zero >= 2


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints; another one is written at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Number of checkpoints to keep."""


class LogConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between rows of metrics.jsonl."""


class Config(Section):
    corpus: Annotated[tuple[CorpusConfig, ...], BeforeValidator(as_corpora)] = ()
    """A path, or a list of {path, name, features, weight, repeats, cap, where, exclude}."""
    run_dir: Path | None = None
    """Output folder; an existing run in it is resumed."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""
    condition: Literal["text", "class"] = "text"
    """Conditioning of the model: captions, or the class labels of the corpus (`KEY.cls`)."""
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
            why = "jvp needs whole weights, but train.zero=3 shards them (DeepSpeed's gathering has no forward-mode derivative)"
            raise ConfigConflict("objective.derivative", f"{why}: use zero 1 or 2, or finite-difference")
        if self.objective.derivative == "jvp" and self.train.attention not in ("auto", "sdpa"):
            raise ConfigConflict(
                "train.attention", f"{self.train.attention} has no forward-mode derivative, which jvp needs: use auto or sdpa"
            )
        return self

    def kind_shares(self, *, before: int | None = None) -> list[tuple[float, float]]:
        """Shares of images with r = t and with r = 0: at the first step, then for each scheduled stage (starting before step `before`)."""
        first = self.objective.diffusion_share, self.objective.consistency_share
        stages = [0, *(stage.step for stage in self.plan.schedule if before is None or stage.step < before)]
        return [self.plan.kind_shares_at(step, first=first) for step in stages]

    @property
    def condition_dropout(self) -> float:
        """Share of images trained without their caption or class."""
        return self.text.caption_dropout if self.condition == "text" else self.network.params.class_dropout_prob or 0.0


def to_yaml(config: BaseModel) -> str:
    """Serialize a configuration as YAML, with all keys and defaults."""
    return yaml_file.dump(config)


def digest(config: BaseModel) -> str:
    """Hash of the resolved configuration."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16]
