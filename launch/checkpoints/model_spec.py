"""What a run's configuration and folder say about its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launch.checkpoints.checkpoint import LATEST, step_folder
from launch.config.load import load_config
from launch.config.schema import Config, TextConfig
from tim.model_folder.folder import ModelSpec, is_model_folder, training_step, weights_file
from tim.pretrained.weight_files import HUB

PUBLISHED_GUIDANCE = 2.5


def spec_of(config: Config, *, step: int | None = None) -> ModelSpec:
    """Model specification of a run after `step` steps (default: all). Guidance is on by default only if conditions were dropped in
    training."""
    sampling = config.sampling
    default_guidance = PUBLISHED_GUIDANCE if config.condition_dropout else 1.0
    return ModelSpec(
        network=config.network.params.model_dump(exclude_none=True),
        rope=config.network.rope,
        transport={"kind": config.objective.transport, **config.objective.transport_settings()},
        codec={**config.codec.model_dump(include={"kind", "channels"}, exclude_none=True), **_weights(config.codec.path)},
        text=_encoder(config.text) if config.condition == "text" else None,
        sampling={
            "steps": sampling.steps,
            "guidance": default_guidance if sampling.guidance is None else sampling.guidance,
            "interval": list(sampling.interval),
            "shift": config.objective.shift if sampling.shift is None else sampling.shift,
            "instantaneous": all(diffusion == 1 for diffusion, _ in config.kind_shares(before=step or config.train.steps)),
        },
    )


def _encoder(text: TextConfig) -> dict[str, Any]:
    encoder = {"kind": text.kind, "max_tokens": text.max_tokens, **_weights(text.path), **_weights(text.tokenizer, name="tokenizer")}
    return encoder if text.path is None else {**encoder, "precision": text.precision}


def _weights(path: str | None, *, name: str = "path") -> dict[str, str]:
    """Path of a codec's or an encoder's weights, if it has any; local paths become absolute."""
    if path is None:
        return {}
    return {name: path if path.startswith(HUB) else os.path.abspath(path)}


def run_config(run: Path) -> Config:
    """Load the resolved config of a run. Raises ValueError if `run` is not a run folder."""
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder; give the run_dir of a training run")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run}: not a run folder: it has no config.yaml")
    return load_config(run / "config.yaml")


def finished_model(run: Path) -> Path | None:
    """RUN/model, unless the run has none or has saved another checkpoint since. Raises ValueError if it is damaged."""
    model, latest = run / "model", run / LATEST
    if not is_model(model):
        return None
    is_newest = not latest.is_file() or latest.read_text().strip() == step_folder(run, training_step(model) or 0).name
    return model if is_newest else None


def is_model(folder: Path) -> bool:
    return is_model_folder(folder) and weights_file(folder) is not None
