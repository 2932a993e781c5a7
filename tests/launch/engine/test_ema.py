"""Several averages at once, and how they go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from launch.checkpoints.checkpoint import Checkpoint, CheckpointMetadata
from launch.checkpoints.saving.background import Part
from launch.checkpoints.tensor_fragments import Fragment
from launch.config.schema import TrainConfig
from launch.engine.ema import ShardedEMA

SHAPES = {"a": (2,)}


def weights(value: float) -> dict[str, Fragment]:
    return {"a": Fragment(0, torch.full((2,), value))}


def values(ema: ShardedEMA) -> list[float]:
    return [float(average["a"].values[0]) for average in ema.averages]


def saved(folder: Path, ema: ShardedEMA) -> Checkpoint:
    Part(SHAPES, ema.pieces()).write(folder, rank=0)
    return Checkpoint(folder, CheckpointMetadata(step=1, world_size=1, config_hash=""))


def test_each_average_is_what_it_would_be_alone() -> None:
    together = ShardedEMA(weights(0.0), decay=(0.5, 0.9, 0.0))
    alone = [ShardedEMA(weights(0.0), decay=decay) for decay in (0.5, 0.9, 0.0)]
    for updates in range(100, 104):
        for ema in (together, *alone):
            ema.update(weights(float(updates)), updates=updates)
    assert values(together) == [values(ema)[0] for ema in alone]
    assert together.average is together.averages[0]
    assert values(together)[2] == 103.0


def test_averages_go_on_by_their_decay(tmp_path: Path) -> None:
    before = ShardedEMA(weights(1.0), decay=(0.5, 0.9))
    before.averages[1]["a"].values.fill_(2.0)
    found = saved(tmp_path, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema-0.9-00000.safetensors", "ema-00000.safetensors"]

    after = ShardedEMA(weights(0.0), decay=(0.9, 0.99, 0.5))
    notes = after.load(found.pieces, weights(7.0), saved=[0.5, 0.9])
    assert values(after) == [2.0, 7.0, 1.0]
    assert notes == ["train.ema: the average with decay 0.99 is new, it starts from the weights of this checkpoint"]


def test_the_one_average_of_an_older_checkpoint_goes_on_as_the_first(tmp_path: Path) -> None:
    found = saved(tmp_path, ShardedEMA(weights(3.0), decay=0.5))
    several = ShardedEMA(weights(0.0), decay=(0.9, 0.99))
    assert len(several.load(found.pieces, weights(7.0), saved=None)) == 1
    assert values(several) == [3.0, 7.0]


@pytest.mark.parametrize("known", [None, [0.5]])
def test_a_single_average_goes_on_with_another_decay(tmp_path: Path, known: list[float] | None) -> None:
    found = saved(tmp_path, ShardedEMA(weights(3.0), decay=0.5))
    single = ShardedEMA(weights(0.0), decay=0.9)
    assert single.load(found.pieces, weights(7.0), saved=known) == []
    assert values(single) == [3.0]


def test_the_setting_is_a_number_or_a_list() -> None:
    assert TrainConfig(steps=1, ema=0.5).ema == 0.5
    assert TrainConfig.model_validate_json('{"steps": 1, "ema": [0.999, 0.9999]}', strict=True).ema == (0.999, 0.9999)
    for wrong in ((), (1.0,), (0.5, 0.5)):
        with pytest.raises(ValidationError):
            TrainConfig(steps=1, ema=wrong)


def test_averages_in_host_memory_have_the_same_numbers(tmp_path: Path) -> None:
    with_weights, on_host = (ShardedEMA(weights(0.0), decay=(0.5, 0.9), device=device) for device in (None, "cpu"))
    for updates in range(20, 25):
        for ema in (with_weights, on_host):
            ema.update(weights(float(updates)), updates=updates)
    assert values(on_host) == values(with_weights)
    assert on_host.load(saved(tmp_path, with_weights).pieces, weights(7.0), saved=[0.5, 0.9]) == []
    assert values(on_host) == values(with_weights)
    elsewhere = {"a": Fragment(0, torch.zeros(2, device="meta"))}
    assert {average["a"].values.device.type for average in ShardedEMA(elsewhere, decay=(0.5, 0.9)).averages} == {"meta"}


def test_averages_are_copies() -> None:
    given = weights(1.0)
    ema = ShardedEMA(given, decay=0.5, device="cpu")
    given["a"].values.fill_(5.0)
    assert values(ema) == [1.0]
