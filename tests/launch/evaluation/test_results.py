"""Intervals, verdicts, bins and scores of an evaluation, on features and images made for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dataprep.synthetic import random_image
from launch.evaluation.bins import ALL, bins_of
from launch.evaluation.results.resampling import Score, measure_distance
from launch.evaluation.results.rows import measure, rows_of, warnings_of
from launch.evaluation.results.tables import markdown_tables, screen_table
from launch.evaluation.results.verdicts import Verdict, summary_of, verdicts_of
from launch.evaluation.samples import Sample
from launch.evaluation.scorers import make_scorers
from launch.evaluation.store import Measured, Setting
from pipeline.storage.shard_reader import ByteRange
from tim.metrics.distances import METRICS
from tim.metrics.intervals import distance_interval

COUNT, WIDTH = 200, 6
DISTANCES = {"pixels": (METRICS["frechet"], METRICS["kernel"])}


def sample(height: int, width: int) -> Sample:
    return Sample("corpus/0", "a", (height, width), height, width, height * width // 16, 0, ByteRange("", 0, 0))


def features(shift: float, *, seed: int = 0, count: int = COUNT) -> Tensor:
    """Of real images (shift 0), and of generated ones of the same samples."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=random) + shift


def verdicts(shifts: dict[int, float]) -> list[Verdict]:
    noise = {steps: 0.05 * features(0, seed=steps) for steps in shifts}
    generated = {Setting(steps, 1.0): Measured({"pixels": features(shift) + noise[steps]}, {}) for steps, shift in shifts.items()}
    found = measure({"pixels": features(0)}, generated, distances=DISTANCES, bins={ALL: np.arange(COUNT)}, resamples=32)
    return verdicts_of(found[ALL])


def test_a_metric_that_falls_with_every_step() -> None:
    found = verdicts({1: 0.6, 2: 0.4, 4: 0.2})
    assert {verdict.outcome for verdict in found} == {"better with every step"}
    assert found[0].text == "Fréchet distance (pixels) falls with every step from 1 to 4, within 95% intervals"
    assert summary_of(found) == "Quality rises with every step from 1 to 4, by every metric, within 95% intervals."


def test_a_metric_that_rises_again() -> None:
    found = verdicts({1: 0.6, 4: 0.2, 8: 0.5})
    assert found[0].text == "Fréchet distance (pixels) rises from 4 to 8 steps, which is worse"
    assert [each.outcome for each in found[0].differences] == ["better", "worse"]
    assert summary_of(found) == "Quality does not rise with every step from 1 to 8: 2 of 2 metrics get worse somewhere."


def test_no_difference_is_no_verdict() -> None:
    found = verdicts({1: 0.2, 2: 0.2})
    assert found[0].text == "Fréchet distance (pixels): no difference within the 95% interval from 1 to 2 steps"
    assert summary_of(found) is not None
    assert verdicts({4: 0.1}) == []
    assert summary_of([]) is None


def test_paired_intervals_are_narrower_and_hold_what_repeats_show() -> None:
    """Generated images of the same samples: their distance varies less than that of two independent sets."""
    metric, values, estimates = METRICS["frechet"], [], []
    real = generated = features(0)
    for repeat in range(40):
        real = features(0, seed=1000 + repeat)
        generated = real + 0.3 + 0.1 * features(0, seed=2000 + repeat)
        estimates.append(measure_distance(metric, real, generated, resamples=32).estimate())
        values.append(estimates[-1].value)
    independent = distance_interval(metric, real, generated, resamples=32)
    widths = [each.high - each.low for each in estimates]
    assert np.mean(widths) < 0.6 * (independent.high - independent.low)
    assert 0.5 < np.mean(widths) / (2 * 1.96 * np.std(values)) < 2


def test_shares_have_intervals_at_their_ends() -> None:
    all_right, one_wrong = Score(torch.ones(64)), Score(torch.tensor([0.0, *[1.0] * 63]))
    assert 0.93 < all_right.estimate().low < 0.96
    assert all_right.minus(one_wrong).low < 0 < all_right.minus(one_wrong).value, "one image is no evidence"
    wrong = Score(torch.tensor([0.0, 1.0]).repeat(32))
    assert all_right.minus(wrong).low > 0
    real = features(0, count=64)
    precision = measure_distance(METRICS["precision"], real, real + 0.01, resamples=8).estimate()
    assert (precision.value, precision.high) == (1.0, 1.0)
    assert precision.low < 0.96


def test_bins_part_the_samples() -> None:
    samples = [sample(16 * (1 + k % 5), 16 * (1 + k % 7)) for k in range(105)]
    found = bins_of(samples)
    for division in ("size", "aspect"):
        parts = [positions for name, positions in found.items() if name.startswith(division)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(105))
        assert len(parts) == 3
    assert list(bins_of([sample(32, 32)] * 9)) == [ALL]
    edges = bins_of([sample(80, 64), sample(64, 80), sample(64, 64), sample(81, 64), sample(64, 81)])
    assert {name: positions.tolist() for name, positions in edges.items() if name.startswith("aspect")} == {
        "aspect below 4:5": [3],
        "aspect 4:5 to 5:4": [0, 1, 2],
        "aspect above 5:4": [4],
    }


def test_few_images_are_named_and_small_bins_left_out() -> None:
    bins = {ALL: np.arange(COUNT), "size 1-2 tokens": np.arange(5), "size 3-9 tokens": np.arange(5, COUNT)}
    generated = {Setting(1, 1.0): Measured({"pixels": features(0.1)}, {"ocr": torch.tensor([float("nan"), 1.0, 0.0, 1.0]).repeat(50)})}
    rows = rows_of(measure({"pixels": features(0)}, generated, distances=DISTANCES, bins=bins, resamples=8))
    assert {row.bin for row in rows} == {ALL, "size 3-9 tokens"}
    assert [(row.images, row.value) for row in rows if row.metric == "ocr" and row.bin == ALL] == [(150, pytest.approx(2 / 3))]
    few, left_out = warnings_of(rows, bins=bins)
    assert "200 images are few (Fréchet distance (pixels) below 2,048" in few
    assert left_out == "size 1-2 tokens: left out, it has only 5 images"
    assert "| Fréchet distance (pixels) ↓ | size 3-9 tokens | 195 |" in markdown_tables(rows)
    assert "Fréchet distance (pixels) ↓" in screen_table(rows, title="a")


def test_figures_are_read_from_images() -> None:
    images, figures = zip(*(random_image(0, index) for index in range(20)), strict=True)
    prompts = [figure.caption for figure in figures]
    scorers = make_scorers(prompts, features=["pixels"], metrics=["accuracy"], clip=None, device=torch.device("cpu"))
    of_images = scorers.features(images)
    assert float(scorers.score(images, prompts, features=of_images)["accuracy"].mean()) >= 0.9
    shifted = [*prompts[1:], prompts[0]]
    assert float(scorers.score(images, shifted, features=of_images)["accuracy"].mean()) <= 0.2
