"""`tim bench attention --fit`: the planner's cost model (`pipeline.cost`), fitted to this device by timing the packed network.

γ comes from packs of equally many tokens in images of one length each: seconds per token grow as 1 + γ·n/6W. The factors of the kinds
come from training steps of the whole objective on the same images, all of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from launch.benchmarks.network import Bench, Grid, fastest
from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION
from pipeline.progress import Progress

SHORTEST = 64  # tokens of an image


def fit_costs(grids: Sequence[Grid], *, max_tokens: int, width: int, batch: int, repeats: int, progress: Progress) -> dict[str, Any]:
    """γ from images of 64 to `max_tokens` tokens, the factors from a pack of `batch` of the grids.

    `largest_error` is by how much the fitted γ misses a measured time at most, as a share of it.

    Raises ValueError if `max_tokens` leaves nothing to compare.
    """
    if max_tokens < 4 * SHORTEST:
        raise ValueError(f"--max-tokens {max_tokens}: attention grows with length, give {4 * SHORTEST} or more to see it")
    bench = Bench(width=width, depth=2)
    sides = sorted({round(math.sqrt(n)) for n in np.geomspace(SHORTEST, max_tokens, 5)})
    packs = {side: [bench.inputs([(side, side)] * max(1, max_tokens // side**2))] for side in sides}
    seconds = fastest(
        {str(side): lambda side=side: bench.train(bench.network, packs[side], derivative=False) for side in sides},
        repeats=repeats,
        progress=progress,
    )
    lengths = np.array([side**2 for side in sides], dtype=np.float64)
    tokens = np.array([sum(bench.lengths(packs[side][0]).tokens) for side in sides])
    per_token = np.array([seconds[str(side)] for side in sides]) / tokens
    gamma, error = fit_gamma(lengths, per_token=per_token, width=width)

    latents, text, rest = bench.inputs(grids[:batch])
    alike = {
        kind: [(latents, text, {**rest, "kinds": torch.full_like(rest["kinds"], kind)})] for kind in (DIFFUSION, CONSISTENCY, TRANSITION)
    }
    by_kind = fastest(
        {str(kind): lambda kind=kind: bench.train(bench.network, alike[kind]) for kind in alike}, repeats=repeats, progress=progress
    )
    return {
        **bench.facts(),
        "width": width,
        "seconds_per_million_tokens": {str(int(n)): 1e6 * float(value) for n, value in zip(lengths, per_token, strict=True)},
        "largest_error": error,
        "gamma": gamma,
        "cost_factors": [by_kind[str(kind)] / by_kind[str(DIFFUSION)] for kind in alike],
    }


def fit_gamma(lengths: np.ndarray, *, per_token: np.ndarray, width: int) -> tuple[float, float]:
    """γ ≥ 0 of the least relative squares of `per_token` ∝ 1 + γ·n/6W, and the largest relative error that remains."""
    columns = np.stack([np.ones_like(lengths), lengths / (6 * width)], axis=1)
    (level, slope), *_ = np.linalg.lstsq(columns / per_token[:, None], np.ones_like(lengths), rcond=None)
    if slope <= 0 or level <= 0:
        level, slope = 1 / np.mean(1 / per_token), 0.0
    return float(slope / level), float(np.abs((columns @ [level, slope]) / per_token - 1).max())
