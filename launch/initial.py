"""`train.init`: the weights that a new run begins with, of a model folder, another run, or a published file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from launch import checkpoint
from launch.config import Config, ConfigError
from launch.export import run_config, spec_of
from launch.history import MOST_NAMED, Initial
from tim import TransitionTransformer, pretrained
from tim.official import read_weights
from tim.weights import ModelSpec, read_spec

logger = logging.getLogger(__name__)

_NOT_COMPARED = ("input_size", "projector_dim", "encoder_depth", "z_dim", "class_dropout_prob", "lora_hidden_size")  # shapes tell


@dataclass(frozen=True, slots=True)
class _Found:
    """Weights under the published names, the file or folder that they came from, and their sha256 (of a run: its manifest's)."""

    path: Path
    weights: dict[str, Tensor]
    digest: str


def load_initial(network: TransitionTransformer, config: Config) -> Initial | None:
    """Set a new network to the weights of `train.init`; nothing if there are none. Every rank calls it; it talks to nobody.

    Raises ConfigError naming what does not fit: with `train.init_strict`, every difference between the two networks.
    """
    path = config.train.init
    if path is None:
        return None
    try:
        found = _read(path)
    except ValueError as error:
        raise ConfigError(f"train.init: {error}") from error
    own = network.state_dict()
    given = {name: value for name, value in found.weights.items() if network.projector is not None or not name.startswith("projector.")}
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if config.train.init_strict:
        _load_strictly(network, given, found=found, config=config)
    elif not fitting:
        raise ConfigError(f"train.init: {path}: none of its {len(found.weights)} tensors fits the network by name and shape")
    else:
        network.load_state_dict(fitting, strict=False)
    return Initial(
        path=path,
        digest=found.digest,
        loaded=len(fitting),
        not_loaded=tuple(name for name in own if name not in fitting),
        not_used=tuple(name for name in given if name not in fitting),
    )


def other_surroundings(config: Config) -> list[str]:
    """What the weights of `train.init` were trained with that this run has otherwise, one line each: they will have to adapt.

    Rotary layout and network (with `train.init_strict` those are refused), codec, text encoder and transport.
    """
    path = config.train.init
    spec = None if path is None else _spec(Path(path))
    if spec is None:
        return []
    own = spec_of(config)
    parts = [(name, *((getattr(each, name) or {}).get("kind", "none") for each in (spec, own))) for name in ("codec", "text", "transport")]
    lines = [f"{name} {before}, this run has {now}" for name, before, now in parts if before != now]
    return [f"train.init: {path} was trained with {line}" for line in [*_differences(spec, config), *lines]]


def _read(name: str) -> _Found:
    """Raises ValueError in one line where there are no weights."""
    path = pretrained.local_folder(name) if name.startswith(pretrained.HUB) else Path(name)
    if not path.is_dir():
        return _Found(path, read_weights(path), pretrained.digest(path))
    if (path / "config.yaml").is_file():
        found = checkpoint.find(path)
        for problem in found.passed_over:
            logger.warning("passed over: %s", problem)
        digest = pretrained.digest(found.folder / checkpoint.MANIFEST)
        return _Found(path, checkpoint.consolidate(found.folder, ema=True), digest)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        raise ValueError(f"{name}: neither a run folder (config.yaml) nor a folder of one model: it has {names}; give the file of weights")
    return _Found(path, read_weights(files[0]), pretrained.digest(files[0]))


def _spec(path: Path) -> ModelSpec | None:
    """What a run or a model folder says of its model; None of the published ones. Raises ValueError where it is damaged."""
    if (path / "config.yaml").is_file():
        return spec_of(run_config(path))
    return read_spec(path) if (path / "config.json").is_file() and not (path / "network.yaml").is_file() else None


def _load_strictly(network: TransitionTransformer, weights: dict[str, Tensor], *, found: _Found, config: Config) -> None:
    remedy = "give the same network, or train.init_strict=false to load what fits"
    spec = _spec(found.path)
    if spec is not None and (differing := _differences(spec, config)):
        raise ConfigError(f"train.init: {found.path} holds another network: {'; '.join(differing[:MOST_NAMED])}: {remedy}")
    try:
        network.load_official(weights)
    except ValueError as error:
        raise ConfigError(f"train.init: {found.path}: {error}: {remedy}") from error


def _differences(spec: ModelSpec, config: Config) -> list[str]:
    """What makes the same tensors mean something else, under the config's keys. Where shapes differ, too, loading names the tensors."""
    before, now = _described(spec), _described(spec_of(config))
    return [f"{key} {before[key]}, this run has {now[key]}" for key in now if key in before and before[key] != now[key]]


def _described(spec: ModelSpec) -> dict[str, Any]:
    params = {f"network.params.{key}": value for key, value in spec.network.items() if key not in _NOT_COMPARED}
    return {"network.rope": spec.rope, **params}
