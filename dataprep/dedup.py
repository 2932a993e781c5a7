"""Duplicates: exact ones by digest, near ones by a 64-bit perceptual hash.

The hash is the classic DCT hash (as `imagehash.phash`): luma at 32×32, the 8×8 lowest frequencies, one bit each for "above their median".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

MAX_DISTANCE = 2  # bits
_BANDS = ((0, 22), (22, 21), (43, 21))  # (shift, bits): hashes that differ in two bits agree in at least one of three bands
_SIDE, _LOW = 32, 8
_COSINES = np.cos(np.pi * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)) * np.sqrt(2 / _SIDE)
_LUMA = np.array([0.299, 0.587, 0.114])
_NOISE = 1.0  # gray levels; below it a coefficient is rounding noise, and so is its bit


class DedupConfig(BaseModel):
    """What becomes of near duplicates: `mark` keeps them and names the better picture, `drop` rejects them, `off` does not look."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    near: Literal["mark", "drop", "off"] = "mark"


def perceptual_hash(pixels: NDArray[np.uint8]) -> int | None:
    """(H, W, 3) uint8 → 64 bits; None for flat pictures and plain gradients, whose bits would be noise."""
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    luma = np.asarray(small).astype(np.float64) @ _LUMA
    low = _COSINES @ luma @ _COSINES.T
    if np.median(np.abs(low)) < _NOISE:
        return None
    bits = (low > np.median(low)).astype(np.uint8)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def exact_duplicates(digests: Sequence[str]) -> dict[int, int]:
    """Positions of repeated digests → position of their first occurrence. Empty digests are never equal."""
    first: dict[str, int] = {}
    repeats: dict[int, int] = {}
    for position, digest in enumerate(digests):
        if not digest:
            continue
        original = first.setdefault(digest, position)
        if original != position:
            repeats[position] = original
    return repeats


def near_duplicates(hashes: Sequence[int | None], *, pixels: Sequence[int], sizes: Sequence[int]) -> dict[int, int]:
    """Positions of near duplicates → position of the picture to keep in their place.

    Pictures are visited by most pixels, most bytes, first position; each one within `MAX_DISTANCE` bits of a picture kept before it is its
    duplicate (of the nearest, then of the one kept first). `hashes` None: not compared. Work grows with the pictures that share a band of
    about 21 bits, not with all pairs.
    """
    order = sorted((position for position, value in enumerate(hashes) if value is not None), key=lambda p: (-pixels[p], -sizes[p], p))
    kept: list[int] = []  # positions, in the order of the visit; a picture's rank is its place in this list
    rank_of: dict[int, int] = {}
    banded: tuple[dict[int, list[tuple[int, int]]], ...] = ({}, {}, {})
    duplicates: dict[int, int] = {}
    for position in order:
        value = hashes[position]
        assert value is not None
        rank = rank_of.get(value)
        if rank is None:
            bands = [value >> shift & ((1 << bits) - 1) for shift, bits in _BANDS]
            candidates = [pair for table, band in zip(banded, bands, strict=True) for pair in table.get(band, ())]
            near = [(distance, other) for other, seen in candidates if (distance := (value ^ seen).bit_count()) <= MAX_DISTANCE]
            if not near:
                rank_of[value] = len(kept)
                for table, band in zip(banded, bands, strict=True):
                    table.setdefault(band, []).append((len(kept), value))
                kept.append(position)
                continue
            rank = min(near)[1]
        duplicates[position] = kept[rank]
    return duplicates
