"""Which parameters of a network are trained (`train.freeze`, `train.lora`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from launch.config.schema import Config, ConfigError
from launch.finetuning.lora import add_adapters, linear_targets
from tim.network import PROJECTOR


def is_finetuned(config: Config) -> bool:
    """Whether a run trains only a part of its weights."""
    return bool(config.train.freeze) or config.train.lora is not None


def frozen_names(network: nn.Module, config: Config) -> list[str]:
    """Names of the weights that a run does not train. network: without adapters.

    With LoRA these are all weights, except for the projection that an alignment teacher trains.
    Raises ConfigError if a pattern of `train.freeze` matches no parameter, or all are frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    if config.train.lora is not None:
        return [name for name in names if not (config.objective.alignment and name.startswith(PROJECTOR))]
    for pattern in config.train.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"train.freeze: {pattern!r} matches no parameter; names look like {names[-1]!r}")
    frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in config.train.freeze)]
    if len(frozen) == len(names):
        raise ConfigError("train.freeze: matches all parameters, nothing is left to train: name fewer of them")
    return frozen


def trained_share(parameters: Iterable[tuple[Sequence[int], bool]]) -> float:
    """Share of the weights of matrices that is trained. parameters: the shape of each, and whether it is trained."""
    counts = [(math.prod(shape), is_trained) for shape, is_trained in parameters if len(shape) > 1]
    return sum(count for count, is_trained in counts if is_trained) / sum(count for count, _ in counts)


def limit_training(network: nn.Module, config: Config) -> None:
    """Freeze weights and add adapters, as the configuration says. Raises ConfigError for a pattern that matches nothing."""
    frozen = set(frozen_names(network, config)) if is_finetuned(config) else set()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if config.train.lora is not None:
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        add_adapters(network, linear_targets(network, config.train.lora), config.train.lora)
        for parameter in trained:  # PEFT freezes all but its adapters
            parameter.requires_grad_(True)
