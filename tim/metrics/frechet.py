"""Fréchet distance between Gaussians fitted to two sets of features (FID, arXiv 1706.08500; FDD on features of DINOv2, arXiv 2306.04675).

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

For centred features X₁ and X₂, the last trace is the sum of the singular values of X₁ X₂ᵀ / √((N−1)(M−1)): exact for few images, without
an F × F matrix. X may be replaced by any R with RᵀR = XᵀX, so the triangle of its QR decomposition is used if it has fewer rows.
The same in float64 as the usual form with covariances, which have n − 1 in the denominator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tim.metrics.inputs import Subsets, checked

_BLOCK = 4  # rows per QR decomposition, in multiples of the width


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """The squared distance as in FID, between (N, F) and (M, F); 0 up to rounding for equal sets.

    Time: O(min(N, F)² · F), and O(N F²) for N > F. Raises ValueError for fewer than two images and for values that are not finite.
    """
    real, generated = checked(real, generated)
    means = [features.mean(0, dtype=torch.float64) for features in (real, generated)]
    first, second = (_factor(features, mean) for features, mean in zip((real, generated), means, strict=True))
    squared = (means[0] - means[1]).square().sum()
    traces = first.square().sum() / (len(real) - 1) + second.square().sum() / (len(generated) - 1)
    cross = _nuclear_norm(first @ second.T) / math.sqrt((len(real) - 1) * (len(generated) - 1))
    return max(float(squared + traces - 2 * cross), 0.0)


def frechet_subsets(real: Tensor, generated: Tensor) -> Subsets:
    """`frechet_distance` of subsets of real (N, F) and generated (M, F) images, from inner products computed once."""
    real, generated = checked(real, generated)
    if real.shape[1] <= min(len(real), len(generated)) // 4:  # a small width: there is little to compute
        return lambda rows, columns: frechet_distance(real[rows], generated[columns])
    shift = real.mean(0, dtype=torch.float64)  # keeps the inner products small
    first, second = real.double() - shift, generated.double() - shift
    inner, squares = first @ second.T, (first.square().sum(1), second.square().sum(1))

    def distance(rows: Tensor, columns: Tensor) -> float:
        n, m = len(rows), len(columns)
        means = first[rows].mean(0), second[columns].mean(0)
        variances = (
            (squares[0][rows].sum() - n * means[0].square().sum()) / (n - 1),
            (squares[1][columns].sum() - m * means[1].square().sum()) / (m - 1),
        )
        across = inner[rows][:, columns]
        centred = across - across.mean(0) - across.mean(1, keepdim=True) + across.mean()
        cross = _nuclear_norm(centred) / math.sqrt((n - 1) * (m - 1))
        return max(float((means[0] - means[1]).square().sum() + variances[0] + variances[1] - 2 * cross), 0.0)

    return distance


def _factor(features: Tensor, mean: Tensor) -> Tensor:
    """A matrix R of at most F rows with RᵀR = XᵀX, for the centred features X, block by block."""
    count, width = features.shape
    if count <= width:
        return features.double() - mean
    factor = mean.new_empty(0, width)
    for block in features.split(_BLOCK * width):
        factor = torch.linalg.qr(torch.cat([factor, block.double() - mean]), mode="r").R
    return factor


def _nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of singular values, as roots of eigenvalues: ten times faster than a decomposition into singular values.

    A singular value below 1e-8 of the largest is rounding: relative to their sum, the error is below 1e-8 times their number.
    """
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(smaller @ smaller.T).clamp(min=0).sqrt().sum()
