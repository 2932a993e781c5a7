"""Loss spikes by kind: what is one, what is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from launch.guards.loss_spikes import MIN_STEPS, STEPS_IN_A_ROW, SpikeDetector

IMAGES = (8, 2, 6)


def spikes(detector: SpikeDetector, steps: Iterable[tuple[float, float, float]]) -> list[tuple[int, str]]:
    """Numbers and descriptions of the steps that complete a spike. Means are by kind."""
    found = (
        (number, detector.add([mean * n for mean, n in zip(means, IMAGES, strict=True)], IMAGES)) for number, means in enumerate(steps)
    )
    return [(number, text) for number, text in found if text]


def noisy(count: int, *, seed: int, level: float = 1.0) -> list[tuple[float, float, float]]:
    """Means that fall slowly, with the skewed noise of small batches."""
    rng = np.random.default_rng(seed)
    trend = level * np.linspace(1.0, 0.6, count)[:, None]
    return [(a, b, c) for a, b, c in trend * rng.gamma(20, 1 / 20, (count, 3)).tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spikes(seed: int) -> None:
    assert spikes(SpikeDetector(), noisy(2000, seed=seed)) == []


def heavy_tailed(count: int, *, seed: int) -> Iterator[tuple[list[float], list[int]]]:
    """Error sums and counts of steps with few images, whose errors are log-normal with a mean of 7 medians, as at random times."""
    rng = np.random.default_rng(seed)
    for images in rng.integers(0, 4, (count, 3)).tolist():
        yield [float(rng.lognormal(0, 2, n).sum()) for n in images], images


@pytest.mark.parametrize("seed", range(10))
def test_heavy_tails_of_few_images_are_no_spikes(seed: int) -> None:
    detector = SpikeDetector()
    assert [text for raw, images in heavy_tailed(2000, seed=seed) if (text := detector.add(raw, images))] == []


@pytest.mark.parametrize("seed", range(3))
def test_a_spike_above_heavy_tails_is_found(seed: int) -> None:
    detector = SpikeDetector()
    steps = list(heavy_tailed(1000, seed=seed))
    highest = max(total / n for raw, images in steps for total, n in zip(raw, images, strict=True) if n)
    for raw, images in steps:
        detector.add(raw, images)
    found = [detector.add([2 * highest * n for n in (1, 2, 1)], [1, 2, 1]) for _ in range(STEPS_IN_A_ROW)]
    assert found[:-1] == [None] * (STEPS_IN_A_ROW - 1)
    assert found[-1]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("outliers", [[100], [100, 140], [60, 101, 140]])
def test_isolated_outliers_do_not_hide_a_later_spike(kind: int, outliers: list[int]) -> None:
    steps = [list(means) for means in noisy(300, seed=10)]
    for number in outliers:
        steps[number][kind] = 1e4
    for means in steps[290:]:
        means[kind] = 9.0
    assert spikes(SpikeDetector(), [(a, b, c) for a, b, c in steps])[0][0] == 290 + STEPS_IN_A_ROW - 1


def test_high_steps_of_different_kinds_are_no_spike() -> None:
    steps = noisy(300, seed=9)
    steps[200:230] = [(9.0, 1.0, 1.0), (1.0, 9.0, 1.0), (1.0, 1.0, 9.0)] * 10
    assert spikes(SpikeDetector(), steps) == []


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("bad", [3.5, float("nan"), float("inf")])
def test_a_rise_of_one_kind_is_a_spike_after_several_steps(kind: int, bad: float) -> None:
    steps = [list(means) for means in noisy(200, seed=1)]
    for means in steps[150:]:
        means[kind] = bad
    first, *others = spikes(SpikeDetector(), [(a, b, c) for a, b, c in steps])
    assert first[0] == 150 + STEPS_IN_A_ROW - 1
    assert first[1].startswith(f"loss_{('diffusion', 'consistency', 'transition')[kind]} {bad:.4g} is above ")
    assert others, "the median stays that of the steps before"


def test_single_difficult_steps_are_no_spikes() -> None:
    steps = noisy(300, seed=2)
    steps[100::4] = [(9.0, 9.0, 9.0)] * len(steps[100::4])
    assert spikes(SpikeDetector(), steps) == []


def test_nothing_is_a_spike_at_the_start_or_after_a_restart() -> None:
    detector = SpikeDetector()
    assert spikes(detector, [*noisy(MIN_STEPS // 2, seed=3), *noisy(MIN_STEPS // 2, seed=3, level=50)]) == []
    detector = SpikeDetector()
    assert len(spikes(detector, [*noisy(100, seed=3), *noisy(STEPS_IN_A_ROW, seed=4, level=50)])) == 1
    detector.restart()
    assert spikes(detector, noisy(100, seed=5, level=50)) == []


def test_a_kind_without_images_is_passed_over() -> None:
    detector = SpikeDetector()
    for a, b, c in noisy(300, seed=6):
        assert detector.add([a * 8, 0.0, c * 6], (8, 0, 6)) is None
        assert detector.add([0.0, b, 0.0], (0, 1, 0)) is None


def test_the_state_is_json_and_complete() -> None:
    steps = [*noisy(100, seed=7), *noisy(6, seed=8, level=9)]
    for split in (10, 90, 101, 102, 104):
        first, second = SpikeDetector(), SpikeDetector()
        before = spikes(first, steps[:split])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [(number + split, text) for number, text in spikes(second, steps[split:])]
        assert before + after == spikes(SpikeDetector(), steps)
