"""Measurements of paired images, with intervals for them and for their differences.

Image k of every setting and model belongs to sample k, with the same caption, size and noise, and so does real image k. A resample is
therefore a random half of the samples, without replacement (delete-d jackknife, Shao and Wu 1989, as in `tim.metrics.intervals`), the same
for real and generated images and for all settings: what differs between samples, but not between settings, cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from launch.evaluation.options import LEAST_IMAGES
from tim.metrics.distances import Metric
from tim.metrics.intervals import LEVEL, MAX_SUBSET, Estimate, mean_interval

_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


class Measurement(Protocol):
    """A number for a setting. `minus` takes the same measurement of other images of the same samples."""

    def estimate(self) -> Estimate: ...

    def minus(self, other: Measurement, /) -> Estimate: ...


@dataclass(frozen=True, slots=True)
class Distance:
    """A distance. resampled: (R,) its values for the resamples; scale: from their spread to that of all images."""

    metric: Metric
    value: float
    resampled: Tensor
    scale: float
    images: int

    def estimate(self) -> Estimate:
        """Within the metric's bounds. The interval of a share, such as precision, is at least Wilson's."""
        low, high = (self.value + sign * self._margin(self.resampled) for sign in (-1, 1))
        low, high = max(low, self.metric.bounds[0]), min(high, self.metric.bounds[1])
        if self.metric.bounds == (0.0, 1.0):
            share = mean_interval((torch.arange(self.images) < round(self.value * self.images)).double())
            low, high = min(low, share.low), max(high, share.high)
        return Estimate(self.value, low, high, self.images)

    def minus(self, other: Measurement, /) -> Estimate:
        assert isinstance(other, Distance)
        difference, margin = self.value - other.value, self._margin(self.resampled - other.resampled)
        return Estimate(difference, difference - margin, difference + margin, self.images)

    def _margin(self, resampled: Tensor) -> float:
        return _Z * self.scale * float(resampled.std())


@dataclass(frozen=True, slots=True)
class Score:
    """The mean of a score. values: (N,), NaN for images without one."""

    values: Tensor

    def estimate(self) -> Estimate:
        return mean_interval(self.values[~self.values.isnan()])

    def minus(self, other: Measurement, /) -> Estimate:
        """With the normal interval: differences of zeros and ones are no share."""
        assert isinstance(other, Score)
        differences = self.values - other.values
        differences = differences[~differences.isnan()]
        mean, margin = float(differences.mean()), _Z * float(differences.std()) / math.sqrt(len(differences))
        return Estimate(mean, mean - margin, mean + margin, len(differences))


def measure_distance(metric: Metric, real: Tensor, generated: Tensor, *, resamples: int) -> Distance:
    """A distance between real and generated images of the same samples, (N, F) each, for at least `LEAST_IMAGES` samples."""
    count = len(real)
    fraction = min(0.5, MAX_SUBSET / count)
    part = max(int(fraction * count), LEAST_IMAGES // 2)
    random = torch.Generator().manual_seed(0)
    prepared = metric.subsets(real, generated) if fraction == 0.5 else None
    values = []
    for _ in range(resamples):
        rows = torch.randperm(count, generator=random)[:part]
        values.append(metric.compute(real[rows], generated[rows]) if prepared is None else prepared(rows, rows))
    resampled = torch.tensor(values, dtype=torch.float64)
    return Distance(metric, metric.compute(real, generated), resampled, math.sqrt(fraction / (1 - fraction)), count)
