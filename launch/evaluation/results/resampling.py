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
        """Of a share, such as precision, not narrower than if as few images as possible make the difference."""
        assert isinstance(other, Distance)
        difference, margin = self.value - other.value, self._margin(self.resampled - other.resampled)
        found = Estimate(difference, difference - margin, difference + margin, self.images)
        if self.metric.bounds != (0.0, 1.0):
            return found
        least = round(abs(difference) * self.images)
        share = _difference_of_shares(*((least, 0) if difference > 0 else (0, least)), count=self.images)
        return Estimate(difference, min(found.low, share.low), max(found.high, share.high), self.images)

    def _margin(self, resampled: Tensor) -> float:
        return _Z * self.scale * float(resampled.std())


@dataclass(frozen=True, slots=True)
class Score:
    """The mean of a score. values: (N,), NaN for images without one."""

    values: Tensor

    def estimate(self) -> Estimate:
        return mean_interval(self.values[~self.values.isnan()])

    def minus(self, other: Measurement, /) -> Estimate:
        assert isinstance(other, Score)
        differences = self.values - other.values
        differences = differences[~differences.isnan()]
        if _are_zeros_and_ones(self.values) and _are_zeros_and_ones(other.values):
            return _difference_of_shares(int((differences > 0).sum()), int((differences < 0).sum()), count=len(differences))
        mean, margin = float(differences.mean()), _Z * float(differences.std()) / math.sqrt(len(differences))
        return Estimate(mean, mean - margin, mean + margin, len(differences))


def _are_zeros_and_ones(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1) | values.isnan()).all())


def _difference_of_shares(up: int, down: int, *, count: int) -> Estimate:
    """Difference of two shares of the same `count` images, of which `up` are in the first only, and `down` in the second only.

    Bonett and Price's interval (2012, doi 10.3102/1076998611411915): five of many images that all change in one direction are no
    evidence, as by McNemar's exact test. By the normal interval, four of any number would be.
    """
    value, total = (up - down) / count, count + 2
    centre, margin = (up - down) / total, _Z * math.sqrt(up + down + 2 - (up - down) ** 2 / total) / total
    return Estimate(value, min(centre - margin, value), max(centre + margin, value), count)


def measure_distance(metric: Metric, real: Tensor, generated: Tensor, *, resamples: int) -> Distance:
    """A distance between real and generated images of the same samples, (N, F) each, for at least `LEAST_IMAGES` samples.

    Above 2,048 samples a resample has 1,024 of them.
    """
    count = len(real)
    fraction = min(0.5, MAX_SUBSET / count)
    part = max(int(fraction * count), LEAST_IMAGES // 2)
    random = torch.Generator().manual_seed(0)
    prepared = metric.subsets(real, generated) if fraction == 0.5 else None
    values, all_of_part = [], torch.arange(part)
    for _ in range(resamples):
        rows = torch.randperm(count, generator=random)[:part]
        if prepared is not None:
            values.append(prepared(rows, rows))
        else:  # not by `compute`: KID's takes 100 random parts of the part
            values.append(metric.subsets(real[rows], generated[rows])(all_of_part, all_of_part))
    resampled = torch.tensor(values, dtype=torch.float64)
    return Distance(metric, metric.compute(real, generated), resampled, math.sqrt(fraction / (1 - fraction)), count)
