"""Fit the planner's cost model (`pipeline.cost`) to this device by timing the packed network (`tim bench attention --fit`).

γ is fitted to packs with equal token counts and images of one length each: seconds per token grow as 1 + γ·n/6W. The factors of the kinds
are measured in training steps of the full objective on the same images, all of one kind.
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
    """Fit γ to images of 64 to `max_tokens` tokens, and the factors to a pack of `batch` of the grids.

    `largest_error` is the largest relative error of the fit.

    Raises ValueError if `max_tokens` is too small for a fit.
    """
    if max_tokens < 4 * SHORTEST:
        raise ValueError(
            f"--max-tokens {max_tokens}: too small to measure the growth of attention with length; give {4 * SHORTEST} or more"
        )
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
    packs_by_kind = {
        kind: [(latents, text, {**rest, "kinds": torch.full_like(rest["kinds"], kind)})] for kind in (DIFFUSION, CONSISTENCY, TRANSITION)
    }
    seconds_by_kind = fastest(
        {str(kind): lambda kind=kind: bench.train(bench.network, packs_by_kind[kind]) for kind in packs_by_kind},
        repeats=repeats,
        progress=progress,
    )
    return {
        **bench.facts(),
        "width": width,
        "seconds_per_million_tokens": {str(int(n)): 1e6 * float(value) for n, value in zip(lengths, per_token, strict=True)},
        "largest_error": error,
        "gamma": gamma,
        "cost_factors": [seconds_by_kind[str(kind)] / seconds_by_kind[str(DIFFUSION)] for kind in packs_by_kind],
    }


def fit_gamma(lengths: np.ndarray, *, per_token: np.ndarray, width: int) -> tuple[float, float]:
    """Fit γ ≥ 0 of `per_token` ∝ 1 + γ·n/6W by relative least squares. Returns γ and the largest relative error."""
    columns = np.stack([np.ones_like(lengths), lengths / (6 * width)], axis=1)
    (level, slope), *_ = np.linalg.lstsq(columns / per_token[:, None], np.ones_like(lengths), rcond=None)
    if slope <= 0 or level <= 0:
        level, slope = 1 / np.mean(1 / per_token), 0.0
    return float(slope / level), float(np.abs((columns @ [level, slope]) / per_token - 1).max())
