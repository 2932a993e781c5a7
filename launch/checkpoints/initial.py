"""Initial weights of a new run (`train.init`), from a model folder, another run, or a published file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoints import checkpoint
from launch.checkpoints.export import run_config, spec_of
from launch.checkpoints.history import MAX_NAMED, Initial
from launch.checkpoints.initial_weights import InitialWeights, load_weights
from launch.config.schema import Config, ConfigError
from tim import TransitionTransformer
from tim.model_folder.folder import ModelSpec, is_model_folder, read_spec, weights_file
from tim.pretrained import weight_files

_NOT_COMPARED = ("input_size", "projector_dim", "encoder_depth", "z_dim", "class_dropout_prob", "lora_hidden_size")  # visible in the shapes


def load_initial(network: TransitionTransformer, config: Config) -> Initial | None:
    """Load the weights of `train.init`, if given, into a new network. Called on every rank; does not communicate.

    Raises ConfigError naming the mismatches; with `train.init_strict`, any difference between the two networks.
    """
    path = config.train.init
    if path is None:
        return None
    try:
        found = load_weights(_local(path))
    except ValueError as error:
        raise ConfigError(f"train.init: {error}") from error
    parameters = network.state_dict()
    given = {name: value for name, value in found.state.items() if network.projector is not None or not name.startswith("projector.")}
    matching = {name: value for name, value in given.items() if name in parameters and parameters[name].shape == value.shape}
    if config.train.init_strict:
        _load_strictly(network, given, found=found, config=config)
    elif not matching:
        raise ConfigError(f"train.init: {path}: none of its {len(found.state)} tensors matches the network by name and shape")
    else:
        network.load_state_dict(matching, strict=False)
    return Initial(
        path=path,
        digest=_digest(found.source),
        loaded=len(matching),
        not_loaded=tuple(name for name in parameters if name not in matching),
        not_used=tuple(name for name in given if name not in matching),
    )


def context_differences(config: Config) -> list[str]:
    """Differences between this run and the training of the `train.init` weights, one line each.

    Compares rotary layout and network (rejected with `train.init_strict`), codec, text encoder and transport.
    """
    spec = None if config.train.init is None else _spec(_local(config.train.init))
    if spec is None:
        return []
    current = spec_of(config)
    parts = [
        (name, *((getattr(each, name) or {}).get("kind", "none") for each in (spec, current))) for name in ("codec", "text", "transport")
    ]
    lines = [f"{name} {before}, this run has {now}" for name, before, now in parts if before != now]
    lines = [*_differences(spec.network, rope=spec.rope, config=config), *lines]
    return [f"train.init: {config.train.init} was trained with {line}" for line in lines]


def _local(name: str) -> Path:
    return weight_files.local_folder(name) if name.startswith(weight_files.HUB) else Path(name)


def _digest(source: Path) -> str:
    """Digest of a file, a model folder's weights, or a checkpoint's manifest (which has the digests of all its files)."""
    if source.is_dir():
        manifest = source / checkpoint.MANIFEST
        source = manifest if manifest.is_file() else weights_file(source) or source
    return weight_files.digest(source)


def _spec(path: Path) -> ModelSpec | None:
    """Model specification of a run or a model folder; None for published weights. Raises ValueError if it is damaged."""
    run = path.parents[1] if path.parent.name == "checkpoints" else path
    if (run / "config.yaml").is_file():
        return spec_of(run_config(run))
    return read_spec(path) if is_model_folder(path) else None


def _load_strictly(network: TransitionTransformer, weights: dict[str, Tensor], *, found: InitialWeights, config: Config) -> None:
    remedy = "give the same network, or train.init_strict=false to load the matching tensors"
    if found.params is not None and found.rope is not None:
        differing = _differences(found.params, rope=found.rope, config=config)
        if differing:
            raise ConfigError(f"train.init: {found.source} holds another network: {'; '.join(differing[:MAX_NAMED])}: {remedy}")
    try:
        network.load_official(weights)
    except ValueError as error:
        raise ConfigError(f"train.init: {found.source}: {error}: {remedy}") from error


def _differences(params: Mapping[str, Any], *, rope: str, config: Config) -> list[str]:
    """Settings that change the meaning of equal tensors, by config key. Loading reports different shapes."""
    current = config.network.params.model_dump(exclude_none=True)
    pairs = {f"network.params.{key}": (params[key], current[key]) for key in current if key in params and key not in _NOT_COMPARED}
    pairs["network.rope"] = rope, config.network.rope
    return [f"{key} {before}, this run has {now}" for key, (before, now) in pairs.items() if before != now]
