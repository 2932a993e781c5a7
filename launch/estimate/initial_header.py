"""Check the weights of `train.init` by the headers of their files, without reading them."""

from __future__ import annotations

import torch
from torch import Tensor

from launch.checkpoints import checkpoint
from launch.checkpoints.finetuned.base import recorded_base
from launch.checkpoints.initial_weights import weights_file
from launch.checkpoints.model_spec import finished_model, run_config
from launch.config.schema import Config, ConfigError
from launch.model_place import locate_model
from tim import TransitionTransformer
from tim.model_folder import folder as model_folder
from tim.pretrained import weight_files
from tim.pretrained.headers import read_header


def check_initial(config: Config) -> str:
    """Compare names and shapes with the network's. Returns one line about them.

    Raises ConfigError if the weights are missing, or, with `train.init_strict`, differ from the network's.
    """
    path = config.train.init
    if path is None:
        return "none: random weights"
    if path.startswith(weight_files.HUB):
        return f"{path}: downloaded and checked when the run starts"
    network = _network(config)
    try:
        given = _header(path)
        if config.train.init_strict:
            network.load_official(given)
            return f"{path}: {len(given)} tensors, all as in the network"
    except ValueError as error:
        raise ConfigError(f"train.init: {error}") from error
    own = network.state_dict()
    matching = sum(name in own and own[name].shape == tensor.shape for name, tensor in given.items())
    if not matching:
        raise ConfigError(f"train.init: {path}: none of its {len(given)} tensors matches the network by name and shape")
    return f"{path}: {matching} of {len(own)} tensors of the network match"


def _network(config: Config) -> TransitionTransformer:
    """The network of a configuration, without values."""
    with torch.device("meta"):
        return TransitionTransformer.from_official(config.network.params.model_dump(exclude_none=True), rope=config.network.rope)


def _header(name: str) -> dict[str, Tensor]:
    """Tensors without values of a weight file, a model folder, a run or a checkpoint."""
    place = locate_model(name)
    finished = finished_model(place.path) if place.kind == "run" else None
    if place.run is not None and finished is None:
        found = checkpoint.find(place.run, step=place.step)
        if recorded_base(found.folder) is not None:  # which holds a part of the weights only
            return _network(run_config(place.run)).state_dict()
        return {name: torch.empty(shape, device="meta") for name, shape in found.pieces("ema").shapes.items()}
    folder = finished or place.path
    if folder.is_file():
        return read_header(folder)
    file = model_folder.weights_file(folder) if model_folder.is_model_folder(folder) else weights_file(folder)
    if file is None:
        raise ValueError(f"{folder}: a model folder without weights: copy the whole folder again")
    return read_header(file)
