"""Maximum mean discrepancies: KID with a polynomial kernel (arXiv 1801.01401), CMMD with a Gaussian one (arXiv 2401.09603)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tim.metrics.inputs import Subsets, checked

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's
SIGMA, SCALE = 10.0, 1000.0  # of the CMMD paper
_BLOCK = 4096  # images a side of a block of kernel values

Kernel = Callable[[Tensor, Tensor], Tensor]  # float64 (A, F), (B, F) → (A, B)


class _Sums(NamedTuple):
    """Kernel values added up, of n real and m generated images: over the pairs within each set, over its images with themselves, and
    across the sets."""

    n: int
    real: float
    real_diagonal: float
    across: float
    m: int
    generated: float
    generated_diagonal: float


def kernel_distance(real: Tensor, generated: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED) -> float:
    """KID between (N, F) and (M, F): the squared discrepancy for the kernel (x·y / F + 1)³, unbiased, hence at times below 0.

    The mean over `subsets` random subsets of `subset_size` images of each, those that torch-fidelity draws with this seed. With no more
    images than that, over all of them.
    """
    real, generated = checked(real, generated)
    if max(len(real), len(generated)) <= subset_size:
        return _unbiased(_sums(real, generated, _polynomial))
    size = min(subset_size, len(real), len(generated))
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = [torch.from_numpy(random.choice(len(features), size, replace=False)) for features in (generated, real)]
        values.append(_unbiased(_sums(real[rows[1]], generated[rows[0]], _polynomial)))
    return math.fsum(values) / subsets


def kernel_subsets(real: Tensor, generated: Tensor) -> Subsets:
    """KID of subsets of images, over all images of each."""
    return _subsets(*checked(real, generated), _polynomial, _unbiased)


def rbf_distance(real: Tensor, generated: Tensor) -> float:
    """CMMD between (N, F) and (M, F): 1000 times the squared discrepancy for a Gaussian kernel with σ = 10 on features of unit length.

    The estimator of the paper's published code, which includes the pairs of an image with itself: never below 0.
    """
    return _biased(_sums(*_unit(real, generated), _gaussian))


def rbf_subsets(real: Tensor, generated: Tensor) -> Subsets:
    """`rbf_distance` of subsets of images."""
    return _subsets(*_unit(real, generated), _gaussian, _biased)


def _unit(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    real, generated = checked(real, generated)
    return F.normalize(real.double(), dim=1), F.normalize(generated.double(), dim=1)


def _polynomial(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _gaussian(first: Tensor, second: Tensor) -> Tensor:
    """exp(−|x − y|² / 2σ²) − 1: the constant cancels in a discrepancy, and small distances are not rounded off."""
    squared = first.square().sum(1)[:, None] + second.square().sum(1) - 2 * first @ second.T
    return torch.expm1(-squared / (2 * SIGMA**2))


def _sums(real: Tensor, generated: Tensor, kernel: Kernel) -> _Sums:
    """Sums over all images, in blocks."""
    first, second = ([block.double() for block in features.split(_BLOCK)] for features in (real, generated))

    def total(blocks: list[Tensor], others: list[Tensor]) -> float:
        return sum(float(kernel(a, b).sum()) for a in blocks for b in others)

    def diagonal(blocks: list[Tensor]) -> float:
        return sum(float(kernel(block, block).trace()) for block in blocks)

    across = total(first, second)
    return _Sums(len(real), total(first, first), diagonal(first), across, len(generated), total(second, second), diagonal(second))


def _subsets(real: Tensor, generated: Tensor, kernel: Kernel, discrepancy: Callable[[_Sums], float]) -> Subsets:
    first, second = real.double(), generated.double()
    within, across, among = kernel(first, first), kernel(first, second), kernel(second, second)

    def distance(rows: Tensor, columns: Tensor) -> float:
        a, b, c = within[rows][:, rows], across[rows][:, columns], among[columns][:, columns]
        sums = (float(each) for each in (a.sum(), a.trace(), b.sum(), c.sum(), c.trace()))
        real_sum, real_diagonal, across_sum, generated_sum, generated_diagonal = sums
        return discrepancy(_Sums(len(rows), real_sum, real_diagonal, across_sum, len(columns), generated_sum, generated_diagonal))

    return distance


def _unbiased(sums: _Sums) -> float:
    real = (sums.real - sums.real_diagonal) / (sums.n * (sums.n - 1))
    generated = (sums.generated - sums.generated_diagonal) / (sums.m * (sums.m - 1))
    return real + generated - 2 * sums.across / (sums.n * sums.m)


def _biased(sums: _Sums) -> float:
    real, generated, across = sums.real / sums.n**2, sums.generated / sums.m**2, sums.across / (sums.n * sums.m)
    return max(SCALE * (real + generated - 2 * across), 0.0)
