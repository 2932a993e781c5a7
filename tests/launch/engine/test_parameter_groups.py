from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.distributed.ranks import Ranks
from launch.engine.engine import Engine
from launch.engine.parameter_groups import parameter_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    result = nn.Module()
    result.embedding = nn.Linear(4, 8)
    result.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    result.forward = lambda x: result.blocks[1](result.blocks[0](result.embedding(x)))  # pyright: ignore
    return result


def groups_of(lr_factors: dict[str, float], *, muon: bool = False) -> list[tuple[float, float, list[str], int]]:
    """Weight decay, factor, parameters and number of shapes of each group."""
    net = network()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = parameter_groups(net, weight_decay=0.1, muon=muon, lr_factors=lr_factors)
    return [
        (group["weight_decay"], group["lr_factor"], [names[id(p)] for p in group["params"]], len(group.get("shapes", ())))
        for group in found
    ]


def test_matrices_decay_and_vectors_do_not() -> None:
    assert groups_of({}) == [
        (0.1, 1.0, ["embedding.weight", "blocks.0.weight", "blocks.1.weight"], 0),
        (0.0, 1.0, ["embedding.bias", "blocks.0.bias", "blocks.1.bias"], 0),
    ]


def test_the_first_pattern_that_matches_gives_the_factor() -> None:
    assert groups_of({"blocks.0.*": 0.5, "blocks.*.weight": 0.1}, muon=True) == [
        (0.1, 0.1, ["blocks.1.weight"], 1),
        (0.1, 0.5, ["blocks.0.weight"], 1),
        (0.1, 1.0, ["embedding.weight"], 0),
        (0.0, 0.5, ["blocks.0.bias"], 0),
        (0.0, 1.0, ["embedding.bias", "blocks.1.bias"], 0),
    ]


def test_a_pattern_without_a_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train\.lr_factors: 'block\.0\.\*' matches no parameter; names look like 'blocks\.1\.bias'"):
        groups_of({"block.0.*": 0.5})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_factors_scale_the_steps_of_their_parameters(alone: Ranks, stage: int) -> None:
    """The first step of Adam has the size of the learning rate."""
    net = network()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    engine = Engine(net, ranks=alone, stage=stage, clip=0.0, lr_factors={"blocks.0.*": 0.5, "embedding.bias": 0.0})
    engine.accumulate(engine(torch.ones(3, 4)).square().sum(), count=3)
    engine.step(lr=0.01)
    moved = {name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in engine.module.named_parameters()}
    engine.close()
    expected = {name: 0.005 if name.startswith("blocks.0") else 0.0 if name == "embedding.bias" else 0.01 for name in moved}
    assert moved == pytest.approx(expected, rel=1e-3)
