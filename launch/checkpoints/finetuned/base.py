"""The frozen weights of a run (`train.freeze`, `train.lora`). Its checkpoints hold trained weights only, and name the others by digest.

    trainer.json    "frozen": {"digest": sha256, "source": path, "lora": {"rank": 16, "alpha": 16.0}}

They are loaded again from `train.init`, or drawn again from the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.checkpoints.checkpoint import TRAINER_STATE, read_trainer_state
from launch.checkpoints.tensor_fragments import Shapes
from launch.config.schema import Config, ConfigError
from launch.finetuning.trainable import frozen_names, is_finetuned

KEY = "frozen"  # in trainer.json
SHOWN = 16  # digits of a digest in messages


@dataclass(frozen=True, slots=True)
class FrozenBase:
    """Frozen weights of a run. digest: sha256 of their names, shapes and float32 values; source: where they were read, None: drawn from the
    seed; lora: rank and alpha of the adapters."""

    digest: str
    source: str | None
    lora: dict[str, float] | None

    @classmethod
    def of(cls, network: nn.Module, config: Config, *, source: str | None) -> FrozenBase | None:
        """Record of a new network without adapters; None if the run trains all weights. Raises ConfigError."""
        if not is_finetuned(config):
            return None
        weights, lora = dict(network.named_parameters()), config.train.lora
        digest = content_digest((name, weights[name]) for name in sorted(frozen_names(network, config)))
        return cls(digest, source, None if lora is None else {"rank": lora.rank, "alpha": lora.strength})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, network: nn.Module, config: Config, *, folder: Path) -> None:
        """Raise ConfigError unless a network, without adapters, has the frozen weights that the checkpoint `folder` names."""
        found = FrozenBase.of(network, config, source=config.train.init)
        if found is None:
            raise ConfigError(
                f"{folder} holds trained weights only, but its run's config.yaml has no train.lora or train.freeze: restore it"
            )
        _check_adapters(self, found, folder=folder)
        _check_digest(self, found, folder=folder)


def recorded_base(folder: Path) -> FrozenBase | None:
    """The frozen weights that a checkpoint names; None if it holds all weights."""
    recorded = read_trainer_state(folder).get(KEY) if (folder / TRAINER_STATE).is_file() else None
    return None if recorded is None else FrozenBase(**recorded)


def check_base(state: Mapping[str, Any], current: FrozenBase | None, *, saved: Shapes, shapes: Shapes, folder: Path) -> None:
    """Raise ConfigError if a run cannot resume from a checkpoint with the trainer's `state`, because its frozen weights or adapters differ.

    Names what is trained first: other frozen weights have another digest, too. current: frozen weights of this run; saved, shapes: of the
    trained parameters in the checkpoint, and of this run.
    """
    recorded = None if state.get(KEY) is None else FrozenBase(**state[KEY])
    if (recorded is None) != (current is None):
        said = "trained all weights, but now train.lora or train.freeze is given"
        if recorded is not None:
            said = "trained only a part of the weights, but now neither train.lora nor train.freeze is given"
        raise ConfigError(f"{folder}: the run {said}: restore the config, or give another run_dir and train.init={folder}")
    if recorded is not None and current is not None:
        _check_adapters(recorded, current, folder=folder)
        _check_trained(saved, shapes, folder=folder)
        _check_digest(recorded, current, folder=folder)


def _check_adapters(recorded: FrozenBase, current: FrozenBase, *, folder: Path) -> None:
    """Raise ConfigError naming the first difference between the adapters of a checkpoint and of a run."""
    if (recorded.lora is None) != (current.lora is None):
        raise ConfigError(f"{folder} was written with{'out' if recorded.lora is None else ''} train.lora: restore the config")
    for key, before in (recorded.lora or {}).items():
        now = (current.lora or {})[key]
        if now != before:
            raise ConfigError(f"{folder} was written with train.lora.{key}={before:g}, not {now:g}: restore it, or give another run_dir")


def _check_trained(saved: Shapes, shapes: Shapes, *, folder: Path) -> None:
    """Raise ConfigError naming a parameter that only the checkpoint or only the run trains, or that has another shape."""
    remedy = "restore train.lora.targets, train.freeze and objective.alignment, or give another run_dir"
    for name in sorted(saved.keys() | shapes.keys()):
        before, now = saved.get(name), shapes.get(name)
        if before != now:
            differ = f"had shape {before}, and has {now} now"
            if before is None or now is None:
                differ = "was trained, and is not now" if now is None else "was not trained, and is now"
            raise ConfigError(f"{folder} holds other trained parameters ({name} {differ}): {remedy}")


def _check_digest(recorded: FrozenBase, current: FrozenBase, *, folder: Path) -> None:
    """Raise ConfigError if the frozen weights of a checkpoint and of a run have other values."""
    if recorded.digest != current.digest:
        differ = f"{current.digest[:SHOWN]}, not {recorded.digest[:SHOWN]} as in {folder}"
        if recorded.source is None:
            raise ConfigError(f"the frozen weights, drawn from the seed, have sha256 {differ}: restore seed, network and train.freeze")
        remedy = f"give the weights that the run began with, train.init={recorded.source}, or another run_dir"
        if not Path(recorded.source).exists() or recorded.source == current.source:
            gone = "are not there any more" if recorded.source != current.source else "have changed"
            remedy = f"the weights that the run began with, {recorded.source}, {gone}: restore them, or give another run_dir"
        raise ConfigError(f"train.init: the frozen weights of {current.source} have sha256 {differ}: {remedy}")


def content_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
