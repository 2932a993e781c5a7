"""A seeded random permutation of 0 … n−1 with random access, without an array of n numbers.

A Feistel network permutes the smallest power of two that is at least n (and at least 16); values of n or more are permuted again until
they are below n (cycle walking, Black and Rogaway 2002), which gives a permutation of 0 … n−1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.randomness import draw_key, mix

_ROUNDS = 6  # even, so that the halves, which may differ by one bit, are not swapped at the end


def order(positions: ArrayLike, *, count: int, key: int) -> NDArray[np.int64]:
    """The items out of `count` at `positions` of the permutation with this 64-bit `key`. Shapes are kept."""
    values = np.asarray(positions, dtype=np.uint64).copy()
    assert values.size == 0 or int(values.max()) < count, (values.max(), count)
    bits = max(4, (count - 1).bit_length())
    flat = values.reshape(-1)
    walking = np.arange(flat.size)
    while walking.size:
        moved = _feistel(flat[walking], bits=bits, key=key)
        flat[walking] = moved
        walking = walking[moved >= np.uint64(count)]
    return values.astype(np.int64)


def shard_order(positions: ArrayLike, *, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The shards at `positions` of an epoch."""
    return order(positions, count=count, key=draw_key(seed, "shards", epoch, ""))


def window_order(*, count: int, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """The order of the `count` samples in a window of shards."""
    return order(np.arange(count), count=count, key=draw_key(seed, "window", epoch, str(window)))


def _feistel(values: NDArray[np.uint64], *, bits: int, key: int) -> NDArray[np.uint64]:
    low_bits = bits // 2
    left_bits, right_bits = bits - low_bits, low_bits
    left, right = values >> np.uint64(low_bits), values & np.uint64((1 << low_bits) - 1)
    round_keys = mix(np.uint64(key) ^ np.arange(_ROUNDS, dtype=np.uint64))
    for round_key in round_keys:
        left, right = right, left ^ (mix(right ^ round_key) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(low_bits)) | right
