"""Load trained weights from a model folder, a run, a checkpoint, an official export, or a published file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from launch.checkpoints import checkpoint
from launch.checkpoints.averages import kind_of
from launch.checkpoints.checkpoint import Checkpoint
from launch.checkpoints.finetuned.base import recorded_base
from launch.checkpoints.finetuned.merge import merged
from launch.checkpoints.history import MAX_NAMED
from launch.checkpoints.model_spec import finished_model, run_config
from launch.config.schema import Config, ConfigError
from launch.model_place import locate_model
from pipeline.errors import one_line
from tim import TransitionTransformer
from tim.model_folder.folder import load_weights as folder_weights
from tim.model_folder.folder import read_spec
from tim.model_kinds import MODEL_FORMS
from tim.network import PROJECTOR
from tim.pretrained.official import NETWORK_FILE, OURS, WEIGHTS, network_description, read_weights
from tim.pretrained.safetensors_files import INDEX, LazyTensors, check_files

ROPE_OF_PUBLISHED = "legacy"
_NOT_COMPARED = ("input_size", "projector_dim", "encoder_depth", "z_dim", "class_dropout_prob", "lora_hidden_size")  # visible in the shapes


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Weights under the published names, float32 or as stored, on the CPU.

    source: folder or file they were read from; params, rope: `network.params` and rotary layout of their network, both None for a bare
    file, which has no metadata.
    """

    source: Path
    state: dict[str, Tensor]
    params: dict[str, Any] | None
    rope: str | None


def load_weights(path: str | Path, *, ema: bool = True) -> InitialWeights:
    """Load the weights of a trained network.

    path: as `locate_model` takes it. For a run, load its `model/`, or its newest intact checkpoint (with `ema`, the average) if that was
    saved later. Without `ema`, load the checkpoint if there is one. A folder RUN/checkpoints/step-000500 gives that step.

    Raises ValueError naming the path if it is none of these, or damaged.
    """
    place = locate_model(path)
    if place.kind == "folder":
        return _load_model_folder(place.path)
    if place.run is not None:
        return _load_run(place.run, step=place.step, ema=ema)
    found = weights_file(place.path) if place.path.is_dir() else place.path
    if place.kind == "weights":
        return InitialWeights(found, read_weights(found), None, None)
    content = read_network_file(place.path)
    params, _ = network_description(content)
    check_files(place.path, (content.get(OURS) or {}).get("files", {}), source=NETWORK_FILE)
    return InitialWeights(found, read_weights(found), params, (content.get(OURS) or {}).get("rope", ROPE_OF_PUBLISHED))


def fill(network: TransitionTransformer, found: InitialWeights, config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load weights into a new network. Returns those given for it, and those loaded.

    Raises ConfigError naming the mismatches; with `train.init_strict`, any difference between the two networks.
    """
    parameters = network.state_dict()
    given = {name: value for name, value in found.state.items() if network.projector is not None or not name.startswith(PROJECTOR)}
    matching = {name: value for name, value in given.items() if name in parameters and parameters[name].shape == value.shape}
    if config.train.init_strict:
        _load_strictly(network, given, found=found, config=config)
    elif not matching:
        raise ConfigError(f"train.init: {config.train.init}: none of its {len(found.state)} tensors matches the network by name and shape")
    else:
        network.load_state_dict(matching, strict=False)
    return given, matching


def base_network(config: Config, *, source: str | None = None) -> TransitionTransformer:
    """The network that a run begins with: from the seed, with the weights of `train.init`, or of `source`. Raises ValueError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = TransitionTransformer.from_official(config.network.params.model_dump(exclude_none=True), rope=config.network.rope)
    if (path := source or config.train.init) is not None:
        fill(network, load_weights(path), config)
    return network


def run_weights(config: Config, found: Checkpoint, *, ema: bool | float) -> LazyTensors:
    """All weights of a run's checkpoint, frozen ones included, adapters merged. Raises ValueError if the frozen ones cannot be found."""
    pieces = found.pieces(kind_of(found.folder, ema))
    base = recorded_base(found.folder)
    if base is None:
        return LazyTensors(pieces.shapes, dict.fromkeys(pieces.shapes, torch.float32), pieces.tensor)
    try:
        network = base_network(config, source=base.source if base.source and Path(base.source).exists() else None)
    except ValueError as error:
        raise ValueError(f"{found.folder} holds trained weights only, and its frozen ones cannot be loaded: {error}") from error
    base.check(network, config, folder=found.folder)
    return merged(pieces, network.state_dict(), base=base)


def weights_file(folder: Path) -> Path:
    """The single weight file in a folder, or the index of its shards. Raises ValueError if there is none, or more than one."""
    index = folder / f"model{INDEX}"
    if index.is_file():
        return index
    found = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS and file.is_file())
    preferred = [file for file in found if file.name == "model.safetensors"] or found
    if not preferred:
        raise ValueError(f"{folder}: not a model folder or a run folder, and has no weight file; give {MODEL_FORMS}")
    if len(preferred) > 1:
        raise ValueError(f"{folder}: holds {', '.join(file.name for file in preferred[:3])}: give the path of one file")
    return preferred[0]


def read_network_file(folder: Path) -> Mapping[str, Any]:
    """Parse `network.yaml` of an official export. Raises ValueError if it does not describe a network."""
    path = folder / NETWORK_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        network_description(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    return content


def _load_model_folder(folder: Path) -> InitialWeights:
    spec = read_spec(folder)
    return InitialWeights(folder, folder_weights(folder), spec.network, spec.rope)


def _load_run(run: Path, *, step: int | None, ema: bool) -> InitialWeights:
    config = run_config(run)
    network, finished = config.network, finished_model(run) if step is None else None
    if finished is not None and (ema or checkpoint.newest(run) is None):
        return _load_model_folder(finished)
    found = checkpoint.find(run, step=step)
    state = run_weights(config, found, ema=ema).all()
    return InitialWeights(found.folder, state, network.params.model_dump(exclude_none=True), network.rope)


def _load_strictly(network: TransitionTransformer, weights: dict[str, Tensor], *, found: InitialWeights, config: Config) -> None:
    remedy = "give the same network, or train.init_strict=false to load the matching tensors"
    if found.params is not None and found.rope is not None:
        differing = differences(found.params, rope=found.rope, config=config)
        if differing:
            raise ConfigError(f"train.init: {found.source} holds another network: {'; '.join(differing[:MAX_NAMED])}: {remedy}")
    try:
        network.load_official(weights)
    except ValueError as error:
        raise ConfigError(f"train.init: {found.source}: {error}: {remedy}") from error


def differences(params: Mapping[str, Any], *, rope: str, config: Config) -> list[str]:
    """Settings that change the meaning of equal tensors, by config key. Loading reports different shapes."""
    current = config.network.params.model_dump(exclude_none=True)
    pairs = {f"network.params.{key}": (params[key], current[key]) for key in current if key in params and key not in _NOT_COMPARED}
    pairs["network.rope"] = rope, config.network.rope
    return [f"{key} {before}, this run has {now}" for key, (before, now) in pairs.items() if before != now]
