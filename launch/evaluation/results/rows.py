"""Rows of an evaluation: the value of a metric with its interval, for a setting and a bin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from launch.evaluation.bins import ALL
from launch.evaluation.results.resampling import Measurement, Score, measure_distance
from launch.evaluation.scorers import SCORES
from launch.evaluation.store import Measured, Setting
from pipeline.cost import Ints
from pipeline.progress import Progress, no_progress
from tim.metrics.distances import METRICS, Metric
from tim.metrics.intervals import Estimate

LEAST_IN_BIN = 16  # images; a smaller bin has no rows

Measure: TypeAlias = tuple[str, str]  # metric, and name of the extractor, "" for a score of images
Measurements: TypeAlias = dict[str, dict[Measure, dict[Setting, Measurement]]]  # by bin


@dataclass(frozen=True, slots=True)
class Row:
    """features: name of the extractor, "" for a score of images; steps, guidance: None for real images, and for features of unknown origin;
    images: number of those that are compared with real ones."""

    metric: str
    features: str
    steps: int | None
    guidance: float | None
    bin: str
    value: float
    low: float
    high: float
    images: int
    better: Literal["lower", "higher"]

    @property
    def measured(self) -> Measure:
        return self.metric, self.features


def title_of(metric: str, features: str = "") -> str:
    """Such as "FID (Inception v3)"."""
    title = METRICS[metric].title if metric in METRICS else SCORES[metric]
    return f"{title} ({features})" if features else title


def measure(
    real: Mapping[str, Tensor],
    generated: Mapping[Setting, Measured],
    *,
    distances: Mapping[str, Sequence[Metric]],
    bins: Mapping[str, Ints],
    resamples: int,
    report: Progress = no_progress,
) -> Measurements:
    """Measure all images and those of each bin. real: features by extractor of the samples that were drawn, in their order."""
    used = {name: torch.from_numpy(positions) for name, positions in bins.items() if name == ALL or len(positions) >= LEAST_IN_BIN}
    scores = list(next(iter(generated.values())).scores)
    total, done = len(used) * len(generated) * sum(map(len, distances.values())), 0
    found: Measurements = {}
    for bin, positions in used.items():
        of_bin: dict[Measure, dict[Setting, Measurement]] = {}
        for extractor, metrics in distances.items():
            for metric in metrics:
                for setting, measured in generated.items():
                    images = real[extractor][positions], measured.features[extractor][positions]
                    of_bin.setdefault((metric.name, extractor), {})[setting] = measure_distance(metric, *images, resamples=resamples)
                    done += 1
                    report("intervals", done, total)
        for name in scores:
            values = {setting: measured.scores[name][positions] for setting, measured in generated.items()}
            if all(int((~each.isnan()).sum()) > 1 for each in values.values()):
                of_bin[name, ""] = {setting: Score(each) for setting, each in values.items()}
        found[bin] = of_bin
    return found


def rows_of(measurements: Measurements) -> list[Row]:
    """All rows, in order of bin, metric and setting."""
    return [
        _row(*measure, setting, bin, measurement.estimate())
        for bin, of_bin in measurements.items()
        for measure, by_setting in of_bin.items()
        for setting, measurement in by_setting.items()
    ]


def better_of(metric: str) -> Literal["lower", "higher"]:
    return METRICS[metric].better if metric in METRICS else "higher"


def _row(metric: str, features: str, setting: Setting, bin: str, found: Estimate) -> Row:
    return Row(metric, features, *setting, bin, found.value, found.low, found.high, found.images, better_of(metric))


def warnings_of(rows: Sequence[Row], *, bins: Mapping[str, Ints], real_images: int | None = None) -> list[str]:
    """Which metrics have too few images, in a line, and which bins cannot be compared or were left out.

    real_images: their number, None: as many as generated ones.
    """
    least = {row.measured: min(row.images, real_images or row.images) for row in rows if row.bin == ALL and row.metric in METRICS}
    few = {measure: images for measure, images in least.items() if images < METRICS[measure[0]].least}
    lines = []
    if few:
        named = ", ".join(f"{title_of(*measure)} below {METRICS[measure[0]].least:,}" for measure in few)
        images = min(few.values())
        lines.append(f"{images} images are few ({named}): compare these numbers only with numbers of {images} images")
    counts = {row.bin: row.images for row in rows if row.bin != ALL and row.metric in METRICS}
    if len(set(counts.values())) > 1:
        between = f"bins have {min(counts.values())} to {max(counts.values())} images"
        lines.append(f"{between}: compare a bin with itself, over steps or models, and not with another bin or with all images")
    small = [f"{name} ({len(positions)})" for name, positions in bins.items() if len(positions) < LEAST_IN_BIN]
    if small:
        lines.append(f"left out, with fewer than {LEAST_IN_BIN} images: {', '.join(small)}")
    return lines
