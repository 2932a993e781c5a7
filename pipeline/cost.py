"""Cost of an image in a training step, in tokens of a plain forward and backward pass.

Per layer of width W a transformer computes 24·n·W² + 4·n²·W for n tokens, so cost ∝ n + n²/6W (KnapFormer, arXiv 2508.06001); γ scales
the quadratic part for a device. Images with r ≠ t need two more forward passes for the derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DIFFUSION, CONSISTENCY, TRANSITION = 0, 1, 2  # r = t, r = 0, r < t
KIND_NAMES = ("diffusion", "consistency", "transition")  # by code
KIND_FACTORS = (1.0, 5 / 3, 5 / 3)  # from operation counts; `tim bench attention --fit` measures them


def image_costs(tokens: ArrayLike, *, kinds: ArrayLike, gamma: float, width: int, factors: Sequence[float] = KIND_FACTORS) -> Floats:
    """(n + γ·n²/6W) · factor[kind] per image; `tokens` and `kinds` are (n,), `width` is the network's W."""
    count = np.asarray(tokens, dtype=np.float64)
    return (count + gamma * count**2 / (6 * width)) * np.asarray(factors)[np.asarray(kinds, dtype=np.int64)]
