"""All random draws: draw = hash(seed, purpose, visit, id), independent of workers, ranks and earlier draws.

A sample's id is CORPUS/KEY; `visit` is the number of times it was planned before. Draws are vectorised: ids are hashed to 64 bits once
(BLAKE2b), the rest is SplitMix64's finaliser on arrays. Streams of numbers (noise) come from NumPy's Philox, keyed with the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def mix(values: Hashes) -> Hashes:
    """SplitMix64's step (Steele, Lea, Flood 2014): a pseudorandom bijection of 64-bit values."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return mixed ^ (mixed >> _SHIFTS[2])


def hash_ids(ids: Sequence[str]) -> Hashes:
    """64-bit hashes of sample ids: (n,) uint64."""
    return np.frombuffer(b"".join([blake2b(i.encode(), digest_size=8).digest() for i in ids]), dtype="<u8").astype(np.uint64)


def draws(seed: int, purpose: str, *, visits: ArrayLike, ids: Hashes) -> Hashes:
    """One 64-bit draw per sample: (n,) uint64. `visits` is (n,) or one number, `ids` come from `hash_ids`."""
    return mix(ids ^ mix(np.atleast_1d(visits).astype(np.uint64) ^ _stream(seed, purpose)))


def uniforms(seed: int, purpose: str, *, visits: ArrayLike, ids: Hashes) -> NDArray[np.float64]:
    """One number in (0, 1) per sample: (n,) float64."""
    return to_uniform(draws(seed, purpose, visits=visits, ids=ids))


def to_uniform(hashes: Hashes) -> NDArray[np.float64]:
    """The upper 52 bits as the midpoint of one of 2⁵² equal parts of (0, 1): never 0 or 1."""
    return ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw_key(seed: int, purpose: str, visit: int, sample_id: str) -> int:
    """The 64-bit draw of one sample."""
    return int(draws(seed, purpose, visits=[visit], ids=hash_ids([sample_id]))[0])


def uniform(seed: int, purpose: str, visit: int, sample_id: str) -> float:
    """A number in (0, 1) for one sample."""
    return float(uniforms(seed, purpose, visits=[visit], ids=hash_ids([sample_id]))[0])


def generators(seed: int, purpose: str, visits: Sequence[int], sample_ids: Sequence[str]) -> list[np.random.Generator]:
    """One generator per sample: Philox with the draw and the id's hash as its 128-bit key."""
    ids = hash_ids(sample_ids)
    keys = np.stack([draws(seed, purpose, visits=np.asarray(visits, dtype=np.int64), ids=ids), ids], axis=1)
    return [np.random.Generator(np.random.Philox(key=key)) for key in keys]


def generator(seed: int, purpose: str, visit: int, sample_id: str) -> np.random.Generator:
    """The generator of one sample."""
    return generators(seed, purpose, [visit], [sample_id])[0]


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: str) -> np.uint64:
    salted = hash_ids([purpose]) ^ mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return mix(salted)[0]
