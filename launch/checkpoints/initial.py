"""Initial weights of a new run (`train.init`), from a model folder, another run, or a published file."""

from __future__ import annotations

import os
from pathlib import Path

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import Checkpoint, read_trainer_state
from launch.checkpoints.finetuned.base import recorded_base
from launch.checkpoints.history import History, Initial
from launch.checkpoints.initial_weights import differences, fill, load_weights
from launch.checkpoints.model_spec import run_config, spec_of
from launch.config.schema import Config, ConfigError
from launch.model_place import locate_model
from tim import TransitionTransformer
from tim.model_folder.folder import ModelSpec, read_spec, weights_file
from tim.pretrained import weight_files


def load_initial(network: TransitionTransformer, config: Config, *, found: Checkpoint | None = None) -> Initial | None:
    """Load the weights of `train.init`, if given, into a new network. Called on every rank; does not communicate.

    found: checkpoint to resume from. Weights that it began with are read where they were found then: another run has gone on since.

    Raises ConfigError naming the mismatches; with `train.init_strict`, any difference between the two networks.
    """
    path = config.train.init
    if path is None:
        return None
    try:
        weights = load_weights(_recorded_source(found, path=path) or path)
    except ValueError as error:
        raise ConfigError(f"train.init: {error}") from error
    given, matching = fill(network, weights, config)
    return Initial(
        path=path,
        digest=_digest(weights.source),
        loaded=len(matching),
        not_loaded=tuple(name for name in network.state_dict() if name not in matching),
        not_used=tuple(name for name in given if name not in matching),
        source=os.path.abspath(weights.source),
    )


def _recorded_source(found: Checkpoint | None, *, path: str) -> Path | None:
    """Where a run read its frozen weights, if it began with the same `train.init`, and they are still there."""
    base = None if found is None else recorded_base(found.folder)
    if found is None or base is None or base.source is None:
        return None
    began = History.from_json(read_trainer_state(found.folder).get("history", {})).init
    return Path(base.source) if began is not None and began.path == path and Path(base.source).exists() else None


def context_differences(config: Config) -> list[str]:
    """Differences between this run and the training of the `train.init` weights, one line each.

    Compares rotary layout and network (rejected with `train.init_strict`), codec, text encoder and transport.
    """
    spec = None if config.train.init is None else _spec(config.train.init)
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


def _spec(name: str) -> ModelSpec | None:
    """Model specification of a run or a model folder; None for published weights. Raises ValueError if it is damaged."""
    place = locate_model(name)
    if place.run is not None:
        return spec_of(run_config(place.run))
    return read_spec(place.path) if place.kind == "folder" else None
