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
from launch.config.data_sections import CodecConfig, CorpusConfig, LoaderConfig, TextConfig, ValidationConfig, as_corpora
from launch.config.model_sections import NetworkConfig, ObjectiveConfig, PreviewConfig, SamplingConfig
from launch.config.run_sections import CheckpointConfig, ClusterConfig, EvalConfig, LogConfig, TrainConfig
from launch.config.section import Section
from launch.config.yaml_file import ConfigConflict, ConfigError
from pipeline.planning.config import PlanConfig

__all__ = ["Config", "ConfigError", "TextConfig", "TrainConfig", "digest", "to_yaml"]


class Config(Section):
    corpus: Annotated[tuple[CorpusConfig, ...], BeforeValidator(as_corpora)] = ()
    """A path, or a list of {path, name, features, weight, repeats, cap, where, exclude, loss_weight}."""
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
    validation: ValidationConfig | None = None
    preview: PreviewConfig = PreviewConfig()
    eval: EvalConfig | None = None
    log: LogConfig = LogConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _scheduled_shares_fit(self) -> Config:
        for number, (diffusion, consistency) in enumerate(self.kind_shares()[1:]):
            if diffusion + consistency > 1 + 1e-9:
                why = f"from step {self.plan.schedule[number].step} on diffusion_share {diffusion:g} and consistency_share {consistency:g}"
                raise ConfigConflict(f"plan.schedule.{number}", f"{why} add up to more than 1")
        return self

    @model_validator(mode="after")
    def _evaluated_steps_are_saved(self) -> Config:
        if self.eval is not None and self.eval.every % self.checkpoint.every:
            raise ConfigConflict("eval.every", f"{self.eval.every} is not a multiple of checkpoint.every={self.checkpoint.every}")
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
