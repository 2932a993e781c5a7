from __future__ import annotations

import math

import pytest
import torch

from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.distributed.ranks import Ranks
from launch.hardware.matmul import measure_matmul_rate
from launch.training.measuring.bins import bin_columns
from launch.training.measuring.image_facts import ImageFacts
from launch.training.measuring.usage import Usage
from launch.training.step_losses import StepLosses
from launch.training.train import train
from pipeline.loading.loader import Batch
from tim import PackedText, TransitionObjective, TransitionTransformer, transports
from tim.flops import Lengths, step_flops
from tim.objective import Losses

PARAMS = TransitionTransformer.from_official(
    {"patch_size": 2, "depth": 1, "hidden_size": 16, "num_heads": 1, "in_channels": 3, "cap_feat_dim": 8}
).params
FACTS = ImageFacts(TransitionObjective(transports.make("ot_fm"), patch_size=2, shift=None), params=PARAMS, alignment=False, trained=0.5)


def batch(*ids: str, weights: list[float], kinds: list[int]) -> Batch:
    count = len(ids)
    return Batch(
        ids=list(ids),
        images=[torch.zeros(3, 4, 4, dtype=torch.uint8)] * count,
        captions=[""] * count,
        labels=torch.full((count,), -1),
        kinds=torch.tensor(kinds),
        uniforms=torch.full((count, 2), 0.5, dtype=torch.float64),
        noise=[torch.zeros(3, 4, 4)] * count,
        weights=torch.tensor(weights),
        tokens=count,
    )


def losses(loss: float, raw: list[float], alignment: list[float]) -> Losses:
    return Losses(torch.tensor(loss), torch.tensor(raw), torch.tensor(alignment))


def test_a_step_adds_up_by_kind(alone: Ranks) -> None:
    tally = StepLosses(FACTS)
    pack = batch("a", "b", "c", "d", weights=[1, 1, 0, 1], kinds=[0, 2, 0, 2])
    tally.add(pack, losses(3.0, [1.0, 2.0, 99.0, 4.0], [0.5, 0.25, 9.0, 1.0]))
    tally.add(batch("", weights=[0], kinds=[0]), losses(0.0, [7.0], [7.0]))
    sums = tally.sums(alone)
    assert (sums.raw, sums.raw_images, sums.failed) == ((1.0, 0.0, 6.0), (1, 0, 2), 1)
    assert (sums.alignment, sums.suspects, sums.all_suspects) == (1.75, [], 0)


def test_a_step_adds_up_by_time_and_size_and_counts_its_work(alone: Ranks) -> None:
    """Uniform draws u and v are the times of ot_fm. A failed image counts in no bin, but its work was planned."""
    tally = StepLosses(FACTS)
    pack = batch("a", "b", "c", weights=[1, 1, 0], kinds=[0, 2, 1])
    pack.uniforms[1] = torch.tensor([0.1, 0.95])
    pack.noise[1] = torch.zeros(3, 6, 4)
    tally.add(pack, losses(3.0, [1.0, 2.0, 99.0], [0.0] * 3), PackedText.from_features([torch.zeros(length, 8) for length in (3, 5, 2)]))
    tally.add(batch("", weights=[0], kinds=[0]), losses(0.0, [7.0], [7.0]), PackedText.from_features([torch.zeros(2, 8)]))
    sums = tally.sums(alone, waited=0.25)
    by_time = {"loss_t_0_20": None, "loss_t_20_40": None, "loss_t_40_60": 1.0, "loss_t_60_80": None, "loss_t_80_100": 2.0}
    assert bin_columns(sums.binned) == {**by_time, "loss_tokens_4": 1.5}
    assert sums.flops == step_flops(PARAMS, Lengths([4, 6, 4], [3, 5, 2]), moving=[1, 2], trained=0.5)
    assert sums.waited == 0.25


def test_a_loss_that_is_not_finite_names_its_suspects(alone: Ranks) -> None:
    tally = StepLosses(FACTS)
    tally.add(batch("a", "b", weights=[1, 1], kinds=[0, 0]), losses(1.0, [1.0, 1.0], [0.0, 0.0]))
    tally.add(batch("c", "d", "e", weights=[1, 1, 1], kinds=[0, 0, 0]), losses(math.nan, [1.0, math.nan, 1.0], [0.0, 0.0, math.inf]))
    sums = tally.sums(alone)
    assert (sums.suspects, sums.all_suspects) == ([(1, 1), (1, 2)], 2)


def test_the_rate_of_a_cpu_is_measured_once_and_not_in_short_runs(alone: Ranks) -> None:
    usage = Usage(alone, precision="fp32")
    assert not usage.measure_rate(trained=1.0)
    assert usage.columns(1e9)["matmul_share"] is None
    assert [usage.measure_rate(trained=60.0) for _ in range(2)] == [True, False]
    columns = usage.columns(1e9)
    assert columns["matmul_share"] == pytest.approx(1e9 / measure_matmul_rate(alone.device, torch.float32))
    assert columns["peak_memory_device"] is None
    assert (columns["peak_memory_host"] or 0) > 2**26


def test_a_run_needs_a_folder() -> None:
    config = load_config(None, overrides=["network.params={depth: 1, hidden_size: 8, num_heads: 1}", "train.steps=5", "corpus=x"])
    with pytest.raises(ConfigError, match="run_dir: missing"):
        train(config)
