"""Size bins of images: powers of two of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cost import Ints

SIZES = 25  # bins, up to 2²⁵ − 1 tokens


def size_bins(tokens: Sequence[int]) -> Ints:
    """(n,) the bin of each image: bin k has images of 2^k to 2^(k+1) − 1 tokens."""
    return np.frexp(np.asarray(tokens, dtype=np.float64))[1].astype(np.int64) - 1


def size_columns(sums: NDArray[np.float64], counts: NDArray[np.float64], *, prefix: str) -> dict[str, float]:
    """Mean losses by size, PREFIX_64 for images of 64 to 127 tokens, of the bins that have images."""
    return {f"{prefix}_{2**size}": float(sums[size] / counts[size]) for size in range(SIZES) if counts[size]}
