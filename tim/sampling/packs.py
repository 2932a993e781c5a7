"""Packs of images to sample together: images of similar numbers of steps, up to a limit of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tim.layers import mlp_width
from tim.model_kinds import Dtype

TOKENS_PER_PACK = {"cpu": 4096}  # on the CPU a pack's activations should stay in its caches; on a GPU it should be busy
MOST_TOKENS = 16384
_WIDTHS = 14  # tensors as wide as the network that a block holds at its peak, and 3 as wide as its hidden layer


def sampling_packs(costs: Sequence[tuple[int, int]], *, limit: int) -> list[list[int]]:
    """Positions of images that are sampled together. costs: steps and tokens in a forward, per image; limit: tokens per pack.

    A pack runs as long as its longest image, so images of many steps go first, together; an image above the limit goes alone.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i][0], -costs[i][1], i))
    packs: list[list[int]] = []
    room = 0
    for position in order:
        tokens = costs[position][1]
        if not packs or tokens > room:
            packs.append([])
            room = limit
        packs[-1].append(position)
        room -= tokens
    return packs


def share_of(costs: Sequence[tuple[int, int]], *, process: int, processes: int) -> list[int]:
    """Positions of the images that one of several processes draws, in order. costs: as in `sampling_packs`. Dealt from the most expensive
    image on, there and back, so that all processes have about as much to do."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i][0] * costs[i][1], i))
    turns = [order[start : start + processes] for start in range(0, len(order), processes)]
    dealt = [turn if number % 2 == 0 else [*reversed(turn)] for number, turn in enumerate(turns)]
    return sorted(turn[process] for turn in dealt if process < len(turn))


def default_tokens(device: torch.device) -> int:
    """Tokens of a pack if no limit is given: about the fastest."""
    return TOKENS_PER_PACK.get(device.type, MOST_TOKENS)


def tokens_within(memory_gb: float, *, params: Mapping[str, Any], dtype: Dtype) -> int:
    """Number of tokens in a forward whose activations take at most `memory_gb` GB (10⁹ bytes), at least 1. Raises ValueError."""
    if not isinstance(memory_gb, (int, float)) or not (math.isfinite(memory_gb) and memory_gb > 0):
        raise ValueError(f"memory_gb {memory_gb}: must be above 0")
    width = params["hidden_size"]
    hidden = 3 * mlp_width(width) * (4 if dtype == "fp32" else 2)
    return max(1, int(memory_gb * 1e9 / (4 * _WIDTHS * width + hidden)))
