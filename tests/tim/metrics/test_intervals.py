"""Intervals contain what they estimate as often as they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.tim.metrics.features import features
from tim.metrics import intervals
from tim.metrics.distances import METRICS
from tim.metrics.intervals import Estimate, distance_interval, mean_interval

DIFFERENT = ("frechet", "kernel", "rbf", "sliced", "precision", "recall")


def estimates(name: str, *, times: int, counts: tuple[int, int], width: int, shift: float, scale: float) -> list[Estimate]:
    """Of independent sets from the same two distributions."""
    return [
        distance_interval(
            METRICS[name],
            features(counts[0], width, seed=2 * seed),
            features(counts[1], width, seed=2 * seed + 1, shift=shift, scale=scale),
            resamples=32,
            seed=seed,
        )
        for seed in range(times)
    ]


def coverage(found: list[Estimate], truth: float) -> float:
    return sum(each.low <= truth <= each.high for each in found) / len(found)


def expected(found: list[Estimate]) -> float:
    return sum(each.value for each in found) / len(found)


@pytest.mark.parametrize("name", ["frechet", "kernel", "precision"])
def test_intervals_of_distances_contain_the_expected_value(name: str) -> None:
    found = estimates(name, times=60, counts=(40, 32), width=8, shift=0.4, scale=1.2)
    assert coverage(found, expected(found)) >= 0.88
    spread = torch.tensor([each.value for each in found]).std()
    widths = torch.tensor([each.high - each.low for each in found]) / (2 * 1.96)
    assert 0.7 < float(widths.mean() / spread) < 1.6


def test_an_unbiased_distance_of_equal_distributions_has_0_in_its_interval() -> None:
    assert coverage(estimates("kernel", times=60, counts=(32, 40), width=8, shift=0.0, scale=1.0), 0.0) >= 0.9


@pytest.mark.soak
@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize(("counts", "width", "shift"), [((64, 64), 16, 0.4), ((64, 64), 128, 0.2), ((128, 48), 32, 0.3)])
def test_coverage_is_near_the_level(name: str, counts: tuple[int, int], width: int, shift: float) -> None:
    found = estimates(name, times=400, counts=counts, width=width, shift=shift, scale=1.15)
    assert 0.92 <= coverage(found, expected(found)) <= 1.0


@pytest.mark.soak
def test_coverage_of_a_distance_with_known_value() -> None:
    """MMD² of normal distributions for the kernel (x·y / F + 1)³, by the moments of x·y for x ~ N(a, I), y ~ N(b, I)."""
    width, shift = 16, 0.4

    def moment(first: float, second: float) -> float:
        mean = width * first * second
        variance = width * (first**2 + second**2 + 1)
        third = 6 * width * first * second
        return (third + 3 * mean * variance + mean**3) / width**3 + 3 * (variance + mean**2) / width**2 + 3 * mean / width + 1

    truth = moment(0, 0) + moment(shift, shift) - 2 * moment(0, shift)
    found = estimates("kernel", times=600, counts=(64, 64), width=width, shift=shift, scale=1.0)
    assert expected(found) == pytest.approx(truth, rel=0.05)
    assert 0.92 <= coverage(found, truth) <= 0.985


@pytest.mark.parametrize("name", sorted(METRICS))
def test_an_interval_is_reproducible_and_holds_its_value(name: str) -> None:
    real, generated = features(24, 6, seed=0), features(17, 6, seed=1, shift=0.5)
    metric = METRICS[name]
    found = distance_interval(metric, real, generated, resamples=16, seed=3)
    assert found == distance_interval(metric, real, generated, resamples=16, seed=3)
    assert found.value == metric.compute(real, generated)
    assert metric.bounds[0] <= found.low < found.value <= found.high <= metric.bounds[1]
    assert found.images == 17
    wide = distance_interval(metric, real, generated, resamples=16, seed=3, level=0.99)
    assert wide.low <= found.low
    assert wide.high >= found.high
    generated[3, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        distance_interval(metric, real, generated)


@pytest.mark.parametrize("name", ["frechet", "kernel"])
def test_many_images_are_resampled_in_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = features(160, 4, seed=0), features(128, 4, seed=1, shift=0.5)
    halves = distance_interval(METRICS[name], real, generated, resamples=200)
    monkeypatch.setattr(intervals, "MAX_SUBSET", 40)
    parts = distance_interval(METRICS[name], real, generated, resamples=200)
    assert parts.value == halves.value
    assert 0.7 < (parts.high - parts.low) / (halves.high - halves.low) < 1.6


def test_few_images_have_no_interval() -> None:
    with pytest.raises(ValueError, match="FID: an interval needs at least 8 real and generated images, not 7 and 9"):
        distance_interval(METRICS["fid"], features(7, 2, seed=0), features(9, 2, seed=1))


def test_precision_of_1_has_an_interval() -> None:
    real = features(50, 4, seed=0)
    found = distance_interval(METRICS["precision"], real, real.clone())
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.85 < found.low < 0.95


def scores(kind: str, count: int, seed: int) -> Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn < 0.9).double() if kind == "shares" else -drawn.log() if kind == "skewed" else 30 + 4 * drawn


@pytest.mark.parametrize(("kind", "truth", "count"), [("shares", 0.9, 60), ("skewed", 1.0, 60), ("flat", 32.0, 8)])
def test_intervals_of_means(kind: str, truth: float, count: int) -> None:
    found = [mean_interval(scores(kind, count, seed), resamples=400) for seed in range(300)]
    assert 0.90 <= coverage(found, truth) <= 0.99
    assert found[0] == mean_interval(scores(kind, count, 0), resamples=400)
    assert found[0].value == pytest.approx(float(scores(kind, count, 0).mean()))


def test_means_of_few_and_of_equal_scores() -> None:
    assert mean_interval(torch.full((9,), 7.0)) == Estimate(7.0, 7.0, 7.0, 9)
    one = mean_interval(torch.ones(1))
    assert (one.value, one.high) == (1.0, 1.0)
    assert one.low < 0.25
    perfect = mean_interval(torch.ones(60))
    assert 0.9 < perfect.low < 0.97
    for values, said in ((torch.tensor([0.5]), "at least two images"), (torch.zeros(0), "finite"), (torch.tensor([1, math.nan]), "finite")):
        with pytest.raises(ValueError, match=said):
            mean_interval(values)
