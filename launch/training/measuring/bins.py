"""Bins of images by time and by size, for losses per bin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cost import Floats, Ints

TIMES = 5  # t in fifths, from the image's end to the noise's
SIZES = 25  # by tokens: bin k has images of 2^k to 2^(k+1) − 1
BINNED = 2 * (TIMES + SIZES)  # sums of all bins, then counts
_TIME_NAMES = tuple(f"{100 * fifth // TIMES}_{100 * (fifth + 1) // TIMES}" for fifth in range(TIMES))


def time_bins(shares: Floats) -> Ints:
    """(n,) the bin of each image. shares: t as shares of the way to pure noise."""
    return np.clip((shares * TIMES).astype(np.int64), 0, TIMES - 1)


def size_bins(tokens: Sequence[int]) -> Ints:
    """(n,) the bin of each image."""
    return np.frexp(np.asarray(tokens, dtype=np.float64))[1].astype(np.int64) - 1


def binned(errors: Floats, *, times: Ints, sizes: Ints) -> Floats:
    """(BINNED,) sums and counts of errors by bin; all arguments are (n,)."""
    parts = ((times, TIMES), (sizes, SIZES))
    sums = [np.bincount(bins, weights=errors, minlength=count) for bins, count in parts]
    counts = [np.bincount(bins, minlength=count) for bins, count in parts]
    return np.concatenate([*sums, *counts]).astype(np.float64)


def bin_columns(values: Sequence[float]) -> dict[str, float | None]:
    """Mean losses by time, null for a bin without images, and by size, only of bins with images. values: (BINNED,)"""
    sums, counts = np.split(np.asarray(values), 2)
    by_time = {
        f"loss_t_{name}": mean_or_none(total, count)
        for name, total, count in zip(_TIME_NAMES, sums[:TIMES].tolist(), counts[:TIMES].tolist(), strict=True)
    }
    return {**by_time, **size_columns(sums[TIMES:], counts[TIMES:], prefix="loss_tokens")}


def size_columns(sums: NDArray[np.float64], counts: NDArray[np.float64], *, prefix: str) -> dict[str, float | None]:
    """Mean losses by size, PREFIX_64 for images of 64 to 127 tokens, of the bins that have images."""
    return {f"{prefix}_{2**size}": mean_or_none(float(sums[size]), float(counts[size])) for size in range(SIZES) if counts[size]}


def mean_or_none(total: float, count: float) -> float | None:
    """Mean of `count` values with this sum; None if there are none, or if it is not finite."""
    return finite_or_none(total / count) if count else None


def finite_or_none(value: float) -> float | None:
    """None in place of a number that JSON does not have."""
    return value if math.isfinite(value) else None
