"""Sampling times: decreasing grids from noise to image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from tim.transports import Transport


def time_grid(
    steps: int, *, transport: Transport, pixels: int | None = None, shift: int | None = None, strength: float = 1.0
) -> list[float]:
    """steps + 1 times from noise to image in float64, spaced by the transport.

    shift: side of the reference square in pixels; with it, times are shifted for an image of `pixels` pixels. strength: share of the
    transport's range at which the first step starts, before the shift: 1 starts from noise, less from an image with noise added.

    Raises ValueError for fewer than one step, a strength outside (0, 1], and for a shift that the transport does not support.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength:g}: must be above 0 (the image itself) and at most 1 (noise)")
    grid = transport.end + (transport.times(steps) - transport.end) * strength if strength < 1 else transport.times(steps)
    if shift is not None and pixels is not None:
        grid = transport.shift(grid, pixels=torch.tensor(pixels), reference=shift)
    return grid.tolist()


def check_times(times: Sequence[float], *, transport: Transport) -> list[float]:
    """The times as a list. Raises ValueError if they do not decrease or leave the transport's range."""
    try:
        grid = [float(t) for t in times]
    except (TypeError, ValueError):
        raise ValueError(f"times {times!r}: give decreasing numbers, from noise to image") from None
    if len(grid) < 2 or not all(later < earlier for earlier, later in pairwise(grid)):
        raise ValueError(f"times {grid}: a grid needs at least two times, each smaller than the one before")
    if not all(math.isfinite(t) for t in grid) or grid[0] > transport.start or grid[-1] < transport.end:
        raise ValueError(f"times {grid}: this transport's times run from {transport.start:g} to {transport.end:g}")
    return grid
