"""Parameter groups of the optimizer: weight decay, Muon, and factors of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from launch.engine.muon import hidden_matrices


def trained_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that are not frozen."""
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)


def parameter_groups(network: nn.Module, *, weight_decay: float, muon: bool, lr_factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Group the trained parameters. Matrices decay; biases and gains do not. With `muon`, hidden matrices form groups with their shapes.

    A group's learning rate is multiplied by its `lr_factor`, that of the first pattern in `lr_factors` that matches a parameter's name.

    Raises ValueError if a pattern matches no parameter.
    """
    hidden = {id(parameter) for parameter in hidden_matrices(network)} if muon else set()
    factors = dict(_factors([name for name, _ in trained_parameters(network)], lr_factors))
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in trained_parameters(network):
        kind = 0 if id(parameter) in hidden else 1 if parameter.ndim >= 2 else 2
        settings = {"weight_decay": weight_decay if kind < 2 else 0.0, "lr_factor": factors[name], "is_matrix": kind < 2}
        group = groups.setdefault((kind, factors[name]), {"params": [], **settings})
        group["params"].append(parameter)
        if kind == 0:
            group.setdefault("shapes", []).append(tuple(parameter.shape))
    return [groups[key] for key in sorted(groups)]


def _factors(names: Iterable[str], lr_factors: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    """Yield the factor of each parameter."""
    unused = set(lr_factors)
    name = ""
    for name in names:
        matching = [pattern for pattern in lr_factors if fnmatchcase(name, pattern)]
        unused.difference_update(matching)
        yield name, lr_factors[matching[0]] if matching else 1.0
    for pattern in lr_factors:
        if pattern in unused:
            raise ValueError(f"train.lr_factors: {pattern!r} matches no parameter; names look like {name!r}")
