"""Duplicates among the inputs and against finished corpora: exact ones by digest, near ones by a 64-bit perceptual hash.

The hash is the DCT hash: the 8×8 lowest frequencies of the luma, one bit each for "above the median". They are computed from the image
itself, not from a 32×32 copy: a low-frequency cosine hardly changes over a strip of rows, so rows are summed in strips first.

Everything runs on arrays. Near duplicates are found by sorting: two hashes that differ in at most two bits share at least two of four
16-bit blocks. The hashes are sorted by each of the six pairs of blocks, and those that share a pair are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

MAX_DISTANCE = 2  # bits
_BLOCKS = (0, 16, 32, 48)
_BLOCK = np.uint64(0xFFFF)
_LOW = 8  # frequencies of either direction
_SIDE = 32  # side in pixels of the classic hash's scaled-down image, which sets the scale of the frequencies
_MIN_STRIPS = 64  # sums of rows per image
_LUMA = np.array([0.299, 0.587, 0.114])
_NOISE = 1.0  # gray levels; a smaller coefficient is rounding noise, and so is its bit


class DedupConfig(BaseModel):
    """Handling of near duplicates: `mark` keeps them and names the better image, `drop` rejects them, `off` does not search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    near: Literal["mark", "drop", "off"] = "mark"


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Arrays that identify n images: `digest` (n, 2), the first 16 bytes of the sha256, 0 if missing; `phash` and `has_phash`; `pixels` and
    `bytes`, which decide the better one of two images."""

    digest: Words
    phash: Words
    has_phash: NDArray[np.bool_]
    pixels: Ints
    bytes: Ints

    def __len__(self) -> int:
        return len(self.digest)

    @classmethod
    def read(cls, table: pa.Table, *, size: str) -> Fingerprints:
        """Read a table with the columns sha256, phash (hexadecimal, "" if missing), width, height, and `size` (bytes)."""
        digests = "".join((digest or "").ljust(64, "0")[:32] for digest in table.column("sha256").to_pylist())
        phashes = [phash or "" for phash in table.column("phash").to_pylist()]
        height, width, length = [pc.fill_null(table.column(name), 0).to_numpy().astype(np.int64) for name in ("height", "width", size)]
        return cls(
            digest=np.frombuffer(bytes.fromhex(digests), ">u8").astype(np.uint64).reshape(-1, 2),
            phash=np.frombuffer(bytes.fromhex("".join(phash.zfill(16) for phash in phashes)), ">u8").astype(np.uint64),
            has_phash=np.array([bool(phash) for phash in phashes], dtype=bool),
            pixels=height * width,
            bytes=length,
        )

    @classmethod
    def join(cls, parts: Sequence[Fingerprints]) -> Fingerprints:
        """Concatenate."""
        return cls(*[np.concatenate([getattr(part, field.name) for part in (_EMPTY, *parts)]) for field in fields(cls)])


_EMPTY = Fingerprints(
    digest=np.zeros((0, 2), np.uint64),
    phash=np.zeros(0, np.uint64),
    has_phash=np.zeros(0, bool),
    pixels=np.zeros(0, np.int64),
    bytes=np.zeros(0, np.int64),
)


def perceptual_hash(pixels: NDArray[np.uint8]) -> int | None:
    """(H, W, 3) uint8 → 64 bits; None for flat images and plain gradients, whose bits would be noise."""
    height, width = pixels.shape[:2]
    strip = max(1, height // _MIN_STRIPS)
    rows = _sums(pixels.reshape(height, width * 3), of=strip).astype(np.float64)
    luma = (_cosines(height, step=strip) @ rows).reshape(_LOW, width, 3) @ _LUMA
    low = luma @ _cosines(width, step=1).T * (2 * _SIDE / (height * width))
    if np.median(np.abs(low)) < _NOISE:
        return None
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _sums(rows: NDArray[np.uint8], *, of: int) -> NDArray[np.unsignedinteger]:
    """(H, n) → (⌈H / of⌉, n): sums of `of` rows each; the last sum is over the remaining rows."""
    whole = len(rows) // of * of
    kind = np.uint16 if of <= 257 else np.uint32  # 257 · 255 just fits
    sums = rows[:whole].reshape(-1, of, rows.shape[1]).sum(axis=1, dtype=kind)
    return sums if whole == len(rows) else np.concatenate([sums, rows[whole:].sum(axis=0, dtype=kind)[None]])


@lru_cache(maxsize=128)
def _cosines(side: int, *, step: int) -> NDArray[np.float64]:
    """(8, ⌈side / step⌉): the lowest frequencies at the centre of every `step` pixels, and of the remaining ones."""
    edges = np.append(np.arange(0, side, step), side)
    middles = (edges[:-1] + edges[1:]) / (2 * side)
    return np.cos(np.pi * np.outer(np.arange(_LOW), middles))


def exact_duplicates(digests: Words) -> Ints:
    """(n, 2) → (n,): position of the first image with the same digest; −1 for that first image and for images without a digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal digests the first position comes first
    in_order = digests[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    originals = np.full(len(order), -1, dtype=np.int64)
    originals[order] = np.where(starts | ~in_order.any(axis=1), -1, first)
    return originals


def near_duplicates(found: Fingerprints, *, among: NDArray[np.bool_], fixed: int = 0) -> Ints:
    """(n,): for every near duplicate the position of the image to keep instead, −1 for all others.

    Images are visited by most pixels, most bytes, first position. An image is a duplicate if an image *kept* before it is within
    `MAX_DISTANCE` bits: of the nearest such image or, among equally near ones, of the one kept first. Images with equal hashes are treated
    alike, except the first of them. Images outside `among`, or without a hash, are ignored. The first `fixed` images are always kept and
    are visited before all others.

    Needs about 100 bytes per image besides the input, and the time of a few sorts.
    """
    visited = np.flatnonzero(among & found.has_phash)
    is_free = visited >= fixed
    visited = visited[np.lexsort((visited, -found.bytes[visited], -found.pixels[visited], is_free))]
    hashes, first, of = np.unique(found.phash[visited], return_index=True, return_inverse=True)
    rank = np.empty(len(hashes), dtype=np.int64)  # of a hash, by the visit of its first image
    rank[np.argsort(first)] = np.arange(len(hashes))
    hashes, first = hashes[np.argsort(first)], np.sort(first)  # from here on a hash is identified by its rank
    best = keep_first(*_close_pairs(hashes), count=len(hashes), fixed=int((visited[first] < fixed).sum()))
    duplicates = np.full(len(found), -1, dtype=np.int64)
    own = rank[of]
    kept = np.where(best[own] < 0, own, best[own])
    duplicates[visited] = visited[first[kept]]
    is_kept = (duplicates[visited] == visited) | (visited < fixed)
    duplicates[visited[is_kept]] = -1
    return duplicates


def keep_first(earlier: Ints, later: Ints, distance: NDArray[np.generic], *, count: int, fixed: int = 0) -> Ints:
    """(count,): for items in order of preference, the nearest similar kept item (the first of equally near ones), −1 if it is kept.

    `earlier[i]` and `later[i]` are similar, at `distance[i]`, and earlier < later. An item is kept if no kept item before it is similar,
    or if it is one of the first `fixed`.
    """
    alike = later >= fixed
    earlier, later, distance = earlier[alike], later[alike], distance[alike]
    order = np.lexsort((earlier, distance, later))
    earlier, later = earlier[order], later[order]
    best = np.full(count, -1, dtype=np.int64)
    if not len(later):
        return best
    kept = bytearray(b"\1") * count
    chosen: list[tuple[int, int]] = []
    for one, other in zip(earlier.tolist(), later.tolist(), strict=True):
        if kept[one] and kept[other]:
            kept[other] = 0
            chosen.append((other, one))
    rows = np.array(chosen, dtype=np.int64)
    best[rows[:, 0]] = rows[:, 1]
    return best


def _close_pairs(hashes: Words) -> tuple[Ints, Ints, Ints]:
    """All pairs of different hashes within `MAX_DISTANCE` bits: positions of the earlier one, of the later one, and their distance."""
    parts = [_pairs_that_share(hashes, blocks=blocks) for blocks in combinations(range(len(_BLOCKS)), 2)]
    count = max(len(hashes), 1)
    earlier, later = np.divmod(np.unique(np.concatenate([np.minimum(*pair) * count + np.maximum(*pair) for pair in parts])), count)
    return earlier, later, np.bitwise_count(hashes[earlier] ^ hashes[later]).astype(np.int64)


def _pairs_that_share(hashes: Words, *, blocks: tuple[int, int]) -> tuple[Ints, Ints]:
    """Close pairs among the hashes that have two blocks in common."""
    keys = np.zeros(len(hashes), dtype=np.uint32)
    for block in blocks:
        keys = (keys << np.uint32(16)) | (hashes >> np.uint64(_BLOCKS[block]) & _BLOCK).astype(np.uint32)
    order = np.argsort(keys, kind="stable")
    keys, hashes = keys[order], hashes[order]
    ones, others = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for at, step in _neighbours(keys):
        is_close = np.bitwise_count(hashes[at] ^ hashes[at + step]) <= MAX_DISTANCE
        ones.append(order[at[is_close]])
        others.append(order[at[is_close] + step])
    return np.concatenate(ones), np.concatenate(others)


def _neighbours(keys: NDArray[np.uint32]) -> Iterator[tuple[Ints, int]]:
    """Every pair (i, i + step) of equal sorted keys once: positions i, step by step."""
    at, step = np.flatnonzero(keys[1:] == keys[:-1]), 1
    while len(at):
        yield at, step
        step += 1
        at = at[at + step < len(keys)]
        at = at[keys[at] == keys[at + step]]
