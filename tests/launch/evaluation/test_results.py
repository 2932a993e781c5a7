"""Intervals, verdicts, bins and scores of an evaluation, on features and images made for them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dataprep.synthetic import random_image
from launch.evaluation.bins import ALL, bins_of
from launch.evaluation.results import resampling
from launch.evaluation.results.reference import reference_rows
from launch.evaluation.results.resampling import Distance, Score, measure_distance
from launch.evaluation.results.rows import Row, measure, rows_of, warnings_of
from launch.evaluation.results.tables import markdown_tables, screen_table, value_with_margin
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
    assert left_out == "left out, with fewer than 16 images: size 1-2 tokens (5)"
    assert "| Fréchet distance (pixels) ↓ | size 3-9 tokens | 195 |" in markdown_tables(rows)
    assert "Fréchet distance (pixels) ↓" in screen_table(rows, title="a")
    assert "10 images are few" in warnings_of(rows, bins={}, real_images=10)[0]
    uneven = {ALL: np.arange(COUNT), "size 1-2 tokens": np.arange(50), "size 3-9 tokens": np.arange(50, COUNT)}
    rows = rows_of(measure({"pixels": features(0)}, generated, distances=DISTANCES, bins=uneven, resamples=8))
    assert "bins have 50 to 150 images: compare a bin with itself" in warnings_of(rows, bins=uneven)[1]


def test_few_images_that_differ_are_no_evidence() -> None:
    """As by McNemar's exact test: p is 0.0625 for five, 0.031 for six."""
    for changed, is_certain in ((4, False), (5, False), (6, True)):
        right, wrong = torch.ones(512), (torch.arange(512) >= changed).double()
        found = Score(right).minus(Score(wrong))
        assert found.value == pytest.approx(changed / 512)
        assert (found.low > 0) == is_certain
        assert found.low <= found.value <= found.high
        distances = [
            Distance(METRICS["precision"], share, torch.full((16,), share) + 1e-6 * torch.arange(16), 1.0, 512)
            for share in (1.0, 1 - changed / 512)
        ]
        assert (distances[0].minus(distances[1]).low > 0) == is_certain
        assert (distances[1].minus(distances[0]).high < 0) == is_certain
    partial = Score(torch.full((64,), 0.75)).minus(Score(torch.linspace(0.6, 0.7, 64)))
    assert partial.low > 0, "scores that are no shares have the normal interval"


def test_above_2048_images_the_metric_itself_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """KID takes 100 random parts of a set, which would make the interval a hundred times slower."""
    monkeypatch.setattr(resampling, "MAX_SUBSET", 40)
    counts = []
    metric = METRICS["kernel"]
    counted = replace(metric, compute=lambda real, generated: counts.append(len(real)) or metric.compute(real, generated))
    found = measure_distance(counted, features(0), features(0.3, seed=1), resamples=16).estimate()
    assert counts == [COUNT]
    assert found.low < found.value < found.high


def test_a_verdict_for_each_guidance_scale_and_a_summary_of_metrics() -> None:
    shifts = {(1, 1.0): 0.6, (2, 1.0): 0.3, (4, 1.0): 0.1, (1, 2.5): 0.1, (2, 2.5): 0.3, (4, 2.5): 0.6}
    generated = {Setting(*setting): Measured({"pixels": features(shift)}, {}) for setting, shift in shifts.items()}
    found = verdicts_of(measure({"pixels": features(0)}, generated, distances=DISTANCES, bins={ALL: np.arange(COUNT)}, resamples=32)[ALL])
    assert [each.text for each in found[:2]] == [
        "Fréchet distance (pixels) with guidance 1 falls with every step from 1 to 4, within 95% intervals",
        "Fréchet distance (pixels) with guidance 2.5 rises with every step from 1 to 4, which is worse",
    ]
    assert summary_of(found) == "Quality does not rise with every step from 1 to 4: 2 of 2 metrics get worse somewhere."
    assert summary_of(found[:1]) == "Quality rises with every step from 1 to 4, by every metric, within 95% intervals."
    unclear = verdicts({1: 0.2, 2: 0.2})
    assert summary_of(unclear) == "No metric gets worse from 1 to 2 steps, but none gets better with every step, within 95% intervals."


def test_a_metric_where_more_is_better() -> None:
    share = (torch.arange(COUNT) < COUNT // 2).double()
    scores = {1: share, 2: torch.ones(COUNT), 4: share}
    measured = {("accuracy", ""): {Setting(steps, 1.0): Score(values) for steps, values in scores.items()}}
    (found,) = verdicts_of(measured)
    assert [each.outcome for each in found.differences] == ["better", "worse"]
    assert found.text == "figures as in the prompt falls from 2 to 4 steps, which is worse"


def test_values_have_the_decimals_of_their_margins() -> None:
    shown = {
        (0.82341, 0.78, 0.86): "0.823 ± 0.040",
        (-0.00095371, -0.00128, -0.00062): "-0.00095 ± 0.00033",
        (123.456, 100.0, 146.0): "123 ± 23",
        (1.0, 1.0, 1.0): "1 ± 0",
        (0.5, math.nan, math.nan): "0.5 ± nan",
    }
    assert {numbers: value_with_margin(*numbers) for numbers in shown} == shown


@pytest.mark.parametrize("width", [40, 80, 100, 120])
@pytest.mark.parametrize("settings", [1, 4, 9])
def test_a_table_is_no_wider_than_the_terminal(width: int, settings: int) -> None:
    names = ("pixels", "Inception v3 (weights-inception-2015-12-05-6726825d.pth)")
    rows = [
        Row(metric, name, steps, 1.0, ALL, -0.0009537, -0.00128, -0.00062, 512, "lower")
        for name in names
        for metric in ("frechet", "sliced")
        for steps in range(1, settings + 1)
    ]
    real = [Row("frechet", "pixels", None, None, ALL, 0.0123, 0.011, 0.0134, 512, "lower")]
    text = screen_table(rows, real=real, title="model", width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("-0.00095 ± 0.00033") == len(rows)
    assert text.count("0.0123 ± 0.0012") == 1
    columns = [line for line in text.splitlines() if line.strip().startswith("metric")]
    sizes = [line.count(" step") for line in columns]
    assert sum(sizes) == settings
    assert max(sizes) - min(sizes) <= 2, "parts of nearly equal size"


def test_real_images_have_the_same_numbers() -> None:
    bins = {ALL: np.arange(100), "size 1-2 tokens": np.arange(20), "size 3-9 tokens": np.arange(20, 30)}
    scores = {"ocr": torch.cat([torch.tensor([0.0, 1.0]).repeat(50), torch.full((100,), math.nan)])}
    real = Measured({"pixels": features(0)}, scores)
    rows = reference_rows(real, count=100, distances=DISTANCES, bins=bins, resamples=8)
    assert [(row.metric, row.bin, row.images, row.steps) for row in rows] == [
        ("frechet", ALL, 100, None),
        ("kernel", ALL, 100, None),
        ("ocr", ALL, 100, None),
        ("ocr", "size 1-2 tokens", 20, None),
    ]
    assert rows[0].value == METRICS["frechet"].compute(features(0)[:100], features(0)[100:])
    assert (rows[2].value, rows[2].better) == (0.5, "higher")
    assert rows[1].low < 0 < rows[1].high, "an unbiased distance of two sets of the same images"
    alone = reference_rows(real, count=150, distances=DISTANCES, bins={ALL: np.arange(150)}, resamples=8)
    assert {row.metric for row in alone} == {"ocr"}, "there are no 150 others"


def test_figures_are_read_from_images() -> None:
    images, figures = zip(*(random_image(0, index) for index in range(20)), strict=True)
    prompts = [figure.caption for figure in figures]
    scorers = make_scorers(prompts, features=["pixels"], metrics=["accuracy"], clip=None, device=torch.device("cpu"))
    of_images = scorers.features(images)
    assert float(scorers.score(images, prompts, features=of_images)["accuracy"].mean()) >= 0.9
    shifted = [*prompts[1:], prompts[0]]
    assert float(scorers.score(images, shifted, features=of_images)["accuracy"].mean()) <= 0.2
