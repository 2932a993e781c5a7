"""DeepSpeed's private layout is the one that checkpoints are written from. ZeRO-3 is tested in tests/distributed/test_engine.py."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch import nn

from launch.distributed.ranks import Ranks
from launch.engine.deepspeed_internals import SUPPORTED, shares, weights_replaced
from launch.engine.engine import Engine
from tests import REPOSITORY


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))


def test_the_installed_version_is_one_whose_layout_is_known() -> None:
    installed = version("deepspeed")
    assert installed in SpecifierSet(SUPPORTED), f"check launch/engine/deepspeed_internals.py against deepspeed {installed}"
    assert f'"deepspeed{SUPPORTED};' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_share_is_the_parameter_and_what_is_written_to_it_arrives(alone: Ranks, stage: int) -> None:
    engine = Engine(network(), ranks=alone, stage=stage)
    try:
        parameters = dict(engine.module.named_parameters())
        fragments = engine.fragments()
        assert set(fragments) == set(parameters)
        for name, fragment in fragments.items():
            assert fragment.values.tolist() == parameters[name].flatten()[fragment.start :].tolist()
        with weights_replaced(engine._engine, stage=stage):
            for fragment in fragments.values():
                fragment.values.fill_(2.0)
        assert all(bool((parameter == 2.0).all()) for parameter in parameters.values())
    finally:
        engine.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_another_layout_fails_with_the_name_of_what_is_missing(stage: int) -> None:
    foreign = SimpleNamespace(module=network(), optimizer=SimpleNamespace())
    missing = {1: "Parameter has no _hp_mapping", 3: "SimpleNamespace has no grad_position"}[stage]
    shapes = {name: tuple(parameter.shape) for name, parameter in foreign.module.named_parameters()}
    with pytest.raises(RuntimeError, match=rf"deepspeed \S+: {missing}, which checkpoints need: pip install 'deepspeed>=0\.19\.8,<0\.20'"):
        list(shares(foreign, shapes=shapes, stage=stage, rank=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduce_bucket_size": -1}, r"train\.deepspeed: reduce_bucket_size: input should be greater than 0, got -1"),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memory": "maybe"}},
            r"train\.deepspeed: offload_optimizer\.pin_memory: .* got 'maybe'",
        ),
    ],
)
def test_a_value_that_deepspeed_rejects_is_named_in_one_line(alone: Ranks, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Engine(network(), ranks=alone, stage=1, deepspeed={"zero_optimization": settings, "zero_force_ds_cpu_optimizer": False})
