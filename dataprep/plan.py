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
from dataprep.dedup import DedupConfig, exact_duplicates, near_duplicates

_SAMPLE_OVERHEAD = 8 * 512 + 1024  # headers and padding of four members, and the JSON's own names and numbers


class ShardConfig(BaseModel):
    """A shard is closed before it would exceed either limit; a single larger sample makes a shard of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(default=1_000_000_000, ge=1)
    max_samples: int = Field(default=10_000, ge=1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a shard's table: an input's position, its key ("" if rejected), and what only a look at all inputs could tell."""

    position: int
    key: str
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


def make_plan(tables: ChunkTables, *, shards: ShardConfig, dedup: DedupConfig, seed: int) -> Plan:
    """Decide on all inputs at once. Pure: the same tables and settings give the same plan. Without a kept input there are no shards."""
    reasons: list[str] = tables.column("reason")
    overruled, near = _find_duplicates(tables, reasons=reasons, dedup=dedup)
    for position, (reason, _) in overruled.items():
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
    planned: list[list[Entry]] = []
    for positions in layout:
        entries = []
        for position in positions:
            reason, detail = overruled.get(position, ("", ""))
            representative = near.get(position)
            entries.append(
                Entry(
                    position=position,
                    key=keys.get(position, ""),
                    near_duplicate_of="" if representative is None else keys[representative],
                    reason=reason,
                    detail=detail,
                )
            )
        planned.append(entries)

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


def _find_duplicates(
    tables: ChunkTables, *, reasons: Sequence[str], dedup: DedupConfig
) -> tuple[dict[int, tuple[str, str]], dict[int, int]]:
    """Among the inputs that may be kept: position → (reason, detail) of new rejections, and near duplicate → the picture kept for it."""
    exact = exact_duplicates([digest if not reason else "" for digest, reason in zip(tables.column("sha256"), reasons, strict=True)])
    near: dict[int, int] = {}
    if dedup.near != "off":
        hashes = [
            int(value, 16) if value and not reason and position not in exact else None
            for position, (value, reason) in enumerate(zip(tables.column("phash"), reasons, strict=True))
        ]
        pixels = [(height or 0) * (width or 0) for height, width in zip(tables.column("height"), tables.column("width"), strict=True)]
        near = near_duplicates(hashes, pixels=pixels, sizes=tables.column("input_bytes"))
    originals = tables.rows({*exact.values(), *near.values()})

    def place(position: int) -> str:
        return f"{originals[position]['source']}/{originals[position]['path']}"

    overruled = {position: ("duplicate", f"same bytes as {place(original)}") for position, original in exact.items()}
    if dedup.near == "drop":
        overruled |= {position: ("near-duplicate", f"looks like {place(original)}") for position, original in near.items()}
    return overruled, near


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
