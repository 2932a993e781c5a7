"""Estimates with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from tim.metrics.distances import Metric

DISTANCE_RESAMPLES, MEAN_RESAMPLES, LEVEL = 64, 2000, 0.95
MAX_SUBSET = 1024  # images of a set in a resample
_BLOCK = 1 << 22  # images drawn at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval, from a number of generated images."""

    value: float
    low: float
    high: float
    images: int


def distance_interval(
    metric: Metric, real: Tensor, generated: Tensor, *, resamples: int = DISTANCE_RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """A distance between (N, F) and (M, F) with an interval for its expected value at these numbers of images.

    The interval tells how much the number changes with other images from both sources. It does not remove the bias of few images: the
    Fréchet distance of 256 images is expected to be larger than that of 50,000, so compare numbers of equally many images only.

    A bootstrap with replacement repeats images, which makes each of these distances larger. Here a resample is a random half of either
    set, without replacement (delete-d jackknife, Shao and Wu 1989, doi 10.1214/aos/1176347263): to first order, its distance varies as
    that of independent sets of full size. The interval is the value ± their standard deviation times the normal quantile; their mean,
    which is shifted because half of the images are missing, is not used. Above 2,048 images a resample has 1,024 of them, and the
    deviation is scaled. Intervals are wider than needed, by up to a half, for the Fréchet distance of fewer images than features, and by up
    to twice for nearly equal distributions; too narrow for distributions with heavy tails, where few images dominate. For shares
    (precision, recall) the interval is at least Wilson's, which has a width at 0 and 1, too.

    Memory: inner products of 2,048 × 2,048 images. Raises ValueError as the metric does, and for fewer than 8 images.
    """
    if min(len(real), len(generated)) < 8:
        raise ValueError(f"{metric.title}: an interval needs at least 8 real and generated images, not {len(real)} and {len(generated)}")
    value = metric.compute(real, generated)
    fraction = min(0.5, MAX_SUBSET / max(len(real), len(generated)))
    distances = torch.tensor(list(_resampled(metric, real, generated, fraction=fraction, resamples=resamples, seed=seed)))
    margin = _normal_quantile(level) * float(distances.std()) * math.sqrt(fraction / (1 - fraction))
    low, high = max(value - margin, metric.bounds[0]), min(value + margin, metric.bounds[1])
    if metric.bounds == (0.0, 1.0):
        wilson = _wilson(value, min(len(real), len(generated)), level=level)
        low, high = min(low, wilson[0]), max(high, wilson[1])
    return Estimate(value, low, high, len(generated))


def mean_interval(values: Tensor, *, resamples: int = MEAN_RESAMPLES, level: float = LEVEL, seed: int = 0) -> Estimate:
    """The mean of scores per image (N,), with an interval for its expected value.

    Wilson's interval if all scores are 0 or 1. Otherwise percentiles of the means of resamples with replacement, widened as Student's
    distribution is for N values (Hesterberg 2015, doi 10.1080/00031305.2015.1089789). Raises ValueError for scores that are not finite, and
    for fewer than two that are not 0 or 1.
    """
    values = values.double().flatten()
    count = len(values)
    if count == 0 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"an interval needs finite scores, these {count} are not")
    mean = float(values.mean())
    if bool(((values == 0) | (values == 1)).all()):
        return Estimate(mean, *_wilson(mean, count, level=level), count)
    if count == 1:
        raise ValueError("an interval needs the scores of at least two images")
    generator = torch.Generator().manual_seed(seed)
    rows = max(_BLOCK // count, 1)
    means = torch.cat([
        values[torch.randint(count, (min(rows, resamples - start), count), generator=generator)].mean(1)
        for start in range(0, resamples, rows)
    ])  # fmt: skip
    quantiles = torch.quantile(means, torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=torch.float64)) - mean
    widening = math.sqrt(count / (count - 1)) * _student_quantile(level, count - 1) / _normal_quantile(level)
    return Estimate(mean, mean + widening * float(quantiles[0]), mean + widening * float(quantiles[1]), count)


def _resampled(metric: Metric, real: Tensor, generated: Tensor, *, fraction: float, resamples: int, seed: int) -> Iterator[float]:
    """Distances between random parts of either set, without replacement. Halves share the inner products of all images."""
    generator = torch.Generator().manual_seed(seed)
    counts = [max(int(fraction * len(features)), 4) for features in (real, generated)]
    distance = metric.subsets(real, generated) if fraction == 0.5 else None
    for _ in range(resamples):
        rows, columns = (
            torch.randperm(len(features), generator=generator)[:count].to(features.device)
            for features, count in zip((real, generated), counts, strict=True)
        )
        if distance is None:
            yield metric.subsets(real[rows], generated[columns])(torch.arange(counts[0]), torch.arange(counts[1]))
        else:
            yield distance(rows, columns)


def _normal_quantile(level: float) -> float:
    """Of the standard normal distribution, for a two-sided interval."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def _student_quantile(level: float, freedom: int) -> float:
    """Of Student's distribution, by the first terms of its expansion (Abramowitz and Stegun 26.7.5)."""
    z = _normal_quantile(level)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def _wilson(share: float, count: int, *, level: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` (1927), which keeps its level near 0 and 1."""
    z = _normal_quantile(level)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    margin = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return min(max(centre - margin, 0.0), share), max(min(centre + margin, 1.0), share)  # rounding may part it from a share of 0 or 1
