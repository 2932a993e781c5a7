"""Table of distances between the features of real and of generated images.

FID, KID, MIND, CMMD and FDD are names for one kind of features each. The plain names compute the same on any features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tim.metrics.frechet import frechet_distance, frechet_subsets
from tim.metrics.inputs import Subsets
from tim.metrics.kernels import kernel_distance, kernel_subsets, rbf_distance, rbf_subsets
from tim.metrics.neighbours import precision_recall, precision_subsets, recall_subsets
from tim.metrics.sliced import sliced_subsets, sliced_wasserstein

__all__ = ["METRICS", "Metric", "frechet_distance", "kernel_distance", "precision_recall", "rbf_distance", "sliced_wasserstein"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A distance between features. `compute` takes those of the real images (N, F) and of the generated ones (M, F).

    features: the kind of extractor that it is defined for, None for any; least: number of images below which its value says little;
    subsets: the same for subsets of images, for intervals; bounds: of its values.
    """

    name: str
    title: str
    better: Literal["lower", "higher"]
    features: str | None
    least: int
    compute: Callable[[Tensor, Tensor], float]
    subsets: Callable[[Tensor, Tensor], Subsets]
    bounds: tuple[float, float]


def _precision(real: Tensor, generated: Tensor) -> float:
    return precision_recall(real, generated)[0]


def _recall(real: Tensor, generated: Tensor) -> float:
    return precision_recall(real, generated)[1]


_DISTANCE, _UNBIASED, _SHARE = (0.0, math.inf), (-math.inf, math.inf), (0.0, 1.0)
_FRECHET = frechet_distance, frechet_subsets, _DISTANCE
_KERNEL = kernel_distance, kernel_subsets, _UNBIASED
_RBF = rbf_distance, rbf_subsets, _DISTANCE
_SLICED = sliced_wasserstein, sliced_subsets, _DISTANCE

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("fid", "FID", "lower", "inception", 2048, *_FRECHET),  # fewer images than features: covariances are singular
        Metric("kid", "KID", "lower", "inception", 1000, *_KERNEL),
        Metric("mind", "MIND", "lower", "inception", 5000, *_SLICED),
        Metric("cmmd", "CMMD", "lower", "clip", 1000, *_RBF),
        Metric("fdd", "FDD", "lower", "dinov2", 2048, *_FRECHET),
        Metric("frechet", "Fréchet distance", "lower", None, 2048, *_FRECHET),
        Metric("kernel", "kernel distance", "lower", None, 1000, *_KERNEL),
        Metric("rbf", "Gaussian kernel distance", "lower", None, 1000, *_RBF),
        Metric("sliced", "sliced Wasserstein distance", "lower", None, 5000, *_SLICED),
        Metric("precision", "precision", "higher", None, 1000, _precision, precision_subsets, _SHARE),
        Metric("recall", "recall", "higher", None, 1000, _recall, recall_subsets, _SHARE),
    )
}
