"""Pass 2, the decisions: which inputs are duplicates, in which order the rest is stored, and which shard each one goes to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dataprep.chunks import ChunkTables
from dataprep.dedup import DedupConfig, Fingerprints, Ints, exact_duplicates, near_duplicates
from dataprep.known import NOTHING_KNOWN, Known

_SAMPLE_OVERHEAD = 8 * 512 + 1024  # headers and padding of four members, and the JSON's own names and numbers


class ShardConfig(BaseModel):
    """A shard is closed before it would exceed either limit; a single larger sample makes a shard of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(default=1_000_000_000, ge=1)
    max_samples: int = Field(default=10_000, ge=1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a shard's table: an input's position, its key ("" if rejected), and what only a look at all inputs could tell.

    What it is a duplicate of is the key of the picture that was kept in its place, or CORPUS/KEY where another corpus has that.
    """

    position: int
    key: str
    duplicate_of: str = ""
    near_duplicate_of: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ColumnKind:
    """A further column of the sources: its type in the tables, and in the JSON members, where "missing" can only be ""."""

    table: pa.DataType
    is_number_in_json: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions. `shards[i]` lists the rows of shard i, kept ones in the order of the tar."""

    shards: list[list[Entry]]
    kept: int
    rejected: dict[str, int]
    columns: dict[str, ColumnKind]
    has_classes: bool
    labelled: int


def make_plan(tables: ChunkTables, *, shards: ShardConfig, dedup: DedupConfig, seed: int, known: Known = NOTHING_KNOWN) -> Plan:
    """Decide on all inputs at once. Pure: the same tables and settings give the same plan. Without a kept input there are no shards."""
    reasons: list[str] = tables.column("reason")
    duplicates = _find_duplicates(tables, reasons=reasons, dedup=dedup, known=known)
    for position, (reason, _) in duplicates.rejected.items():
        reasons[position] = reason
    is_kept = [not reason for reason in reasons]
    columns = _column_kinds(tables.column("extra"), is_kept=is_kept)
    order = shuffled(len(reasons), seed=seed)
    names = sum(len(name) + 8 for name in columns)
    lengths, texts = tables.column("length"), tables.column("text_bytes")
    layout = _lay_out(
        order,
        weights=[
            length + text + names + _SAMPLE_OVERHEAD if kept else -1 for kept, length, text in zip(is_kept, lengths, texts, strict=True)
        ],
        config=shards,
    )
    digits = max(4, len(str(shards.max_samples - 1)))
    keys: dict[int, str] = {}
    for number, positions in enumerate(layout):
        kept_here = [position for position in positions if is_kept[position]]
        keys.update({position: f"{number:06d}{place:0{digits}d}" for place, position in enumerate(kept_here)})

    def kept_key(original: int | str | None) -> str:
        """Of the picture that was kept for another, through the near duplicate of it that may have been dropped as well."""
        while isinstance(original, int) and original not in keys:
            original = duplicates.near[original]
        return keys[original] if isinstance(original, int) else original or ""

    planned = [
        [
            Entry(
                position,
                key=keys.get(position, ""),
                duplicate_of=kept_key(duplicates.exact.get(position)),
                near_duplicate_of=kept_key(duplicates.near.get(position)),
                reason=duplicates.rejected.get(position, ("", ""))[0],
                detail=duplicates.rejected.get(position, ("", ""))[1],
            )
            for position in positions
        ]
        for positions in layout
    ]
    rejected: dict[str, int] = {}
    for reason in reasons:
        if reason:
            rejected[reason] = rejected.get(reason, 0) + 1
    labelled = sum(label is not None and kept for label, kept in zip(tables.column("label"), is_kept, strict=True))
    return Plan(
        shards=planned,
        kept=len(keys),
        rejected=dict(sorted(rejected.items())),
        columns=columns,
        has_classes=0 < len(keys) == labelled,
        labelled=labelled,
    )


def shuffled(count: int, *, seed: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on nothing but its arguments, no library's generator included (splitmix64, sorted)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
        state = _mix(_mix(state) + np.uint64(seed % 2**64))
    return np.argsort(state, kind="stable")


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class _Duplicates:
    """Position → the original, a position or CORPUS/KEY, of exact and of near duplicates; and → (reason, detail) where that rejects one."""

    exact: dict[int, int | str]
    near: dict[int, int | str]
    rejected: dict[int, tuple[str, str]]


def _find_duplicates(tables: ChunkTables, *, reasons: Sequence[str], dedup: DedupConfig, known: Known) -> _Duplicates:
    """Among the inputs that may be kept, and those of them that the known corpora have."""
    inputs = Fingerprints.read(
        table.rename_columns({"input_bytes": "bytes"}) for table in tables.tables("sha256", "phash", "width", "height", "input_bytes")
    )
    first = len(known.fingerprints)
    found = Fingerprints.join([known.fingerprints, inputs])
    may_be_kept = np.array([True] * first + [not reason for reason in reasons], dtype=bool)

    def originals(of: Ints) -> dict[int, int | str]:
        of = of[first:]
        repeated = np.flatnonzero(of >= 0)
        return {
            position: known.id(original) if original < first else original - first
            for position, original in zip(repeated.tolist(), of[repeated].tolist(), strict=True)
        }

    exact_positions = exact_duplicates(np.where(may_be_kept[:, None], found.digest, 0))
    exact, near = originals(exact_positions), {}
    if dedup.near != "off":
        near = originals(near_duplicates(found, among=may_be_kept & (exact_positions < 0), fixed=first))
    rows = tables.rows({original for original in (*exact.values(), *near.values()) if isinstance(original, int)})

    def place(original: int | str) -> str:
        return original if isinstance(original, str) else f"{rows[original]['source']}/{rows[original]['path']}"

    rejected = {position: ("duplicate", f"same bytes as {place(original)}") for position, original in exact.items()}
    if dedup.near == "drop":
        rejected |= {position: ("near-duplicate", f"looks like {place(original)}") for position, original in near.items()}
    return _Duplicates(exact=exact, near=near, rejected=rejected)


def _lay_out(order: Iterable[int], *, weights: Sequence[int], config: ShardConfig) -> list[list[int]]:
    """Positions per shard. Weights: bytes in the tar, −1 for rejected inputs, which go with the next kept one (the last with the last)."""
    layout: list[list[int]] = []
    waiting: list[int] = []
    samples = size = 0
    for position in map(int, order):
        waiting.append(position)
        weight = weights[position]
        if weight < 0:
            continue
        if not layout or samples == config.max_samples or size + weight > config.max_bytes:
            layout.append([])
            samples = size = 0
        layout[-1] += waiting
        waiting = []
        samples, size = samples + 1, size + weight
    if layout:
        layout[-1] += waiting
    return layout


def _column_kinds(extras: Iterable[str], *, is_kept: Sequence[bool]) -> dict[str, ColumnKind]:
    """Names of all further columns, sorted, each a number or truth value only if all its values are."""
    types: dict[str, set[type]] = {}
    filled: dict[str, int] = {}
    for extra, kept in zip(extras, is_kept, strict=True):
        for name, value in json.loads(extra).items():
            seen = types.setdefault(name, set())
            if value is not None:
                seen.add(type(value))
                filled[name] = filled.get(name, 0) + kept
    kept_count = sum(is_kept)
    kinds = {frozenset({bool}): pa.bool_(), frozenset({int}): pa.int64()}
    floats = dict.fromkeys((frozenset({float}), frozenset({int, float})), pa.float64())
    columns: dict[str, ColumnKind] = {}
    for name in sorted(types):
        kind = (kinds | floats).get(frozenset(types[name]), pa.string())
        columns[name] = ColumnKind(table=kind, is_number_in_json=kind != pa.string() and filled.get(name, 0) == kept_count)
    return columns
