"""Initial weights of a new run (`train.init`), from a model folder, another run, or a published file."""

from __future__ import annotations

import os
from pathlib import Path

from launch.checkpoints import checkpoint
from launch.checkpoints.history import Initial
from launch.checkpoints.initial_weights import differences, fill, load_weights, local
from launch.checkpoints.model_spec import run_config, spec_of
from launch.config.schema import Config, ConfigError
from tim import TransitionTransformer
from tim.model_folder.folder import ModelSpec, is_model_folder, read_spec, weights_file
from tim.pretrained import weight_files


def load_initial(network: TransitionTransformer, config: Config) -> Initial | None:
    """Load the weights of `train.init`, if given, into a new network. Called on every rank; does not communicate.

    Raises ConfigError naming the mismatches; with `train.init_strict`, any difference between the two networks.
    """
    path = config.train.init
    if path is None:
        return None
    try:
        found = load_weights(local(path))
    except ValueError as error:
        raise ConfigError(f"train.init: {error}") from error
    given, matching = fill(network, found, config)
    return Initial(
        path=path,
        digest=_digest(found.source),
        loaded=len(matching),
        not_loaded=tuple(name for name in network.state_dict() if name not in matching),
        not_used=tuple(name for name in given if name not in matching),
        source=os.path.abspath(found.source),
    )


def context_differences(config: Config) -> list[str]:
    """Differences between this run and the training of the `train.init` weights, one line each.

    Compares rotary layout and network (rejected with `train.init_strict`), codec, text encoder and transport.
    """
    spec = None if config.train.init is None else _spec(local(config.train.init))
    if spec is None:
        return []
    current = spec_of(config)
    parts = [
        (name, *((getattr(each, name) or {}).get("kind", "none") for each in (spec, current))) for name in ("codec", "text", "transport")
    ]
    lines = [f"{name} {before}, this run has {now}" for name, before, now in parts if before != now]
    lines = [*differences(spec.network, rope=spec.rope, config=config), *lines]
    return [f"train.init: {config.train.init} was trained with {line}" for line in lines]


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
