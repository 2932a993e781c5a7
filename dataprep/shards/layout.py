"""Pass 2, the decisions: which inputs are duplicates, the order of the others, and the shard of each input.

Decisions are arrays over the inputs, not objects: about 150 bytes per input, so that many millions fit the memory of one machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from dataprep.dedup.perceptual import DedupConfig, Fingerprints, exact_duplicates, near_duplicates
from dataprep.dedup.reference_corpora import NO_REFERENCES, ReferenceImages
from dataprep.examine.row_chunks import CHUNK_SIZE, ChunkTables
from dataprep.row_schema import SCALED_DOWN, TAKEN_DOWN

Ints = NDArray[np.int64]

_SAMPLE_OVERHEAD = 8 * 512 + 1024  # headers and padding of four members, names and numbers of the JSON
_MASK_OVERHEAD = 2 * 512
SCHEMA_MISMATCH, DUPLICATE, NEAR_DUPLICATE = "bad-record", "duplicate", "near-duplicate"
DUPLICATE_OF = {DUPLICATE: "same bytes as", NEAR_DUPLICATE: "looks like"}  # details, before the name of the other image
TAKEN_DOWN_COPY = "same bytes as an image that a corpus has taken down"  # detail


class ShardConfig(BaseModel):
    """A shard is closed before it exceeds either limit. A sample larger than the limit gets its own shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(default=1_000_000_000, ge=1)
    max_samples: int = Field(default=10_000, ge=1)


@dataclass(frozen=True, slots=True)
class ColumnKind:
    """Type of an extra column of the sources, in the tables and in the JSON members, where a missing value is ""."""

    table: pa.DataType
    is_number_in_json: bool

    def holds(self, value: Any) -> bool:
        """Whether the column can hold this value; None is a missing value."""
        if self.table == pa.string():
            return True
        if value is None:
            return not self.is_number_in_json
        if isinstance(value, bool) or self.table == pa.bool_():
            return isinstance(value, bool) and self.table == pa.bool_()
        return isinstance(value, int) or (isinstance(value, float) and self.table == pa.float64())


@dataclass(frozen=True, slots=True)
class ExtraColumns:
    """The extra columns of a corpus, whether every sample has a class, and whether its new shards have loss masks."""

    kinds: Mapping[str, ColumnKind]
    has_classes: bool
    has_masks: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions, as arrays over the inputs.

    `shard` (from 0), `row` in its table, `number` of the sample in its shard (−1: rejected). `exact` and `near`: the image that the input
    duplicates, −1 for none; an index below `len(references)` is a reference image, others are the input's position plus
    `len(references)`. `schema_mismatches`: position → problem, for inputs that do not fit the corpus's columns. `taken_down` (n,): copies
    of images that a source corpus has taken down.
    """

    shard: Ints
    row: Ints
    number: Ints
    exact: Ints
    near: Ints
    schema_mismatches: Mapping[int, str]
    taken_down: NDArray[np.bool_]
    references: ReferenceImages
    drops_near: bool
    first_shard: int
    shards: int
    digits: int
    kept: int
    rejected: Mapping[str, int]
    columns: ExtraColumns
    labelled: int
    masked: int
    scaled_down: int
    left_out: tuple[str, ...]

    def key(self, position: int) -> str:
        """The key of a kept input, "" of a rejected one."""
        return f"{self.first_shard + self.shard[position]:06d}{self.number[position]:0{self.digits}d}" if self.number[position] >= 0 else ""

    def kept_for(self, original: int) -> str:
        """The key of the kept image that stands for `original`, an entry of `exact` or `near`: the image itself or, if it was dropped, the
        one that it duplicates. CORPUS/KEY for an image of another corpus, "" for −1."""
        first = len(self.references)
        if original >= first and self.number[original - first] < 0:
            original = int(self.near[original - first])
        return "" if original < 0 else self.references.id(original) if original < first else self.key(original - first)


@dataclass(frozen=True, slots=True)
class _Facts:
    """The facts on the inputs that decisions depend on. `reason`: 0 if the input may be kept, else 1 + its index in `names`."""

    reason: NDArray[np.uint8]
    names: list[str]
    prints: Fingerprints
    weights: Ints
    has_label: NDArray[np.bool_]
    has_mask: NDArray[np.bool_]
    is_scaled: NDArray[np.bool_]


def make_plan(
    tables: ChunkTables,
    *,
    shards: ShardConfig,
    dedup: DedupConfig,
    seed: int,
    references: ReferenceImages = NO_REFERENCES,
    columns: ExtraColumns | None = None,
    taken_down: NDArray[np.uint64] | None = None,
    first_shard: int = 0,
) -> Plan:
    """Decide on all inputs at once. Deterministic: the same tables and settings give the same plan. No kept input, no shards.

    `references`: images of finished corpora that inputs may duplicate. `columns`: those of the corpus to append to, which new samples must
    fit; by default they are inferred. `taken_down`: (m, 2) digests of images to reject. `first_shard`: the number of the first shard.
    """
    facts = _read_facts(tables)
    schema_mismatches, left_out = _find_schema_mismatches(tables, facts=facts, columns=columns) if columns else ({}, ())
    may_be_kept = facts.reason == 0
    copies = may_be_kept & _is_taken_down(facts, known=taken_down)
    schema_mismatches = {position: what for position, what in schema_mismatches.items() if not copies[position]}
    may_be_kept[copies] = False
    may_be_kept[list(schema_mismatches)] = False
    exact, near = _find_duplicates(facts.prints, may_be_kept=may_be_kept, references=references.fingerprints, dedup=dedup)
    is_kept = may_be_kept & (exact < 0) & ((near < 0) | (dedup.near != "drop"))

    labelled = int((facts.has_label & is_kept).sum())
    kept = int(is_kept.sum())
    columns = columns or ExtraColumns(kinds=_column_kinds(tables, is_kept=is_kept), has_classes=0 < kept == labelled)
    columns = replace(columns, has_masks=columns.has_masks or bool((facts.has_mask & is_kept).any()))
    names = sum(len(name) + 8 for name in columns.kinds)
    order = shuffled(len(is_kept), seed=seed)
    shard, row, number = _assign_to_shards(order, is_kept=is_kept, weights=facts.weights + names + _SAMPLE_OVERHEAD, config=shards)

    drops_near = dedup.near == "drop"
    overruled = {
        TAKEN_DOWN: int(copies.sum()),
        SCHEMA_MISMATCH: len(schema_mismatches),
        DUPLICATE: int((exact >= 0).sum()),
        NEAR_DUPLICATE: int((near >= 0).sum()) if drops_near else 0,
    }
    return Plan(
        shard=shard,
        row=row,
        number=number,
        exact=exact,
        near=near,
        schema_mismatches=schema_mismatches,
        taken_down=copies,
        references=references,
        drops_near=drops_near,
        first_shard=first_shard,
        shards=int(shard.max(initial=-1)) + 1,
        digits=max(4, len(str(shards.max_samples - 1))),
        kept=kept,
        rejected=_rejected(facts, overruled=overruled),
        columns=columns,
        labelled=labelled,
        masked=int((facts.has_mask & is_kept).sum()),
        scaled_down=int((facts.is_scaled & is_kept).sum()),
        left_out=left_out,
    )


def _rejected(facts: _Facts, *, overruled: Mapping[str, int]) -> dict[str, int]:
    """Numbers of rejected inputs by reason: of the tables, and those of inputs that the tables would keep."""
    counts = Counter(overruled)
    counts.update(dict(zip(facts.names, np.bincount(facts.reason[facts.reason > 0] - 1, minlength=len(facts.names)).tolist(), strict=True)))
    return {reason: count for reason, count in sorted(counts.items()) if count}


def shuffled(count: int, *, seed: int) -> Ints:
    """A permutation of range(count) that depends only on its arguments, not on a library's generator (splitmix64, sorted)."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64)
        state = _mix(_mix(state) + np.uint64(seed % 2**64))
    return np.argsort(state, kind="stable")


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _read_facts(tables: ChunkTables) -> _Facts:
    """One pass over the tables, with one in memory at a time."""
    reason = np.zeros(tables.count, dtype=np.uint8)
    codes: dict[str, int] = {"": 0}
    weights = np.zeros(tables.count, dtype=np.int64)
    has_label, has_mask, is_scaled = (np.zeros(tables.count, dtype=bool) for _ in range(3))
    prints: list[Fingerprints] = []
    for number, table in enumerate(tables):
        here = slice(number * CHUNK_SIZE, number * CHUNK_SIZE + table.num_rows)
        reason[here] = [codes.setdefault(name, len(codes)) for name in table.column("reason").to_pylist()]
        weights[here] = _numbers(table, "length") + _numbers(table, "text_bytes")
        has_label[here] = table.column("label").is_valid().to_numpy()
        mask_bytes = _numbers(table, "mask_bytes")
        has_mask[here] = mask_bytes > 0
        weights[here] += mask_bytes + _MASK_OVERHEAD * (mask_bytes > 0)
        is_scaled[here] = pc.call_function("match_substring", [table.column("detail")], pc.MatchSubstringOptions(SCALED_DOWN)).to_numpy()
        prints.append(Fingerprints.read(table, size="input_bytes"))
    prints_of_all = Fingerprints.join(prints)
    return _Facts(
        reason=reason,
        names=list(codes)[1:],
        prints=prints_of_all,
        weights=weights,
        has_label=has_label,
        has_mask=has_mask,
        is_scaled=is_scaled,
    )


def _is_taken_down(facts: _Facts, *, known: NDArray[np.uint64] | None) -> NDArray[np.bool_]:
    """(n,): inputs with the bytes of an image that was taken down."""
    digests = facts.prints.digest
    marked = facts.reason == 1 + facts.names.index(TAKEN_DOWN) if TAKEN_DOWN in facts.names else np.zeros(len(digests), bool)
    taken = np.concatenate([digests[marked], *([] if known is None else [known])])
    taken = taken[taken.any(axis=1)]  # foreign tars have no digests
    return np.isin(digests[:, 0], taken[:, 0]) & np.isin(digests[:, 1], taken[:, 1])


def _numbers(table: pa.Table, name: str) -> Ints:
    return pc.fill_null(table.column(name), 0).to_numpy()


def _find_duplicates(
    prints: Fingerprints, *, may_be_kept: NDArray[np.bool_], references: Fingerprints, dedup: DedupConfig
) -> tuple[Ints, Ints]:
    """(exact, near), as in `Plan`."""
    first = len(references)
    every = Fingerprints.join([references, prints])
    among = np.concatenate([np.ones(first, dtype=bool), may_be_kept])
    exact = exact_duplicates(np.where(among[:, None], every.digest, np.uint64(0)))[first:]
    among[first:] &= exact < 0
    near = np.full(len(prints), -1, dtype=np.int64)
    if dedup.near != "off":
        near = near_duplicates(every, among=among, fixed=first)[first:]
    return exact, near


def _assign_to_shards(order: Ints, *, is_kept: NDArray[np.bool_], weights: Ints, config: ShardConfig) -> tuple[Ints, Ints, Ints]:
    """(shard, row, number) by position. A rejected input goes with the next kept one in the shuffled order, or with the last kept one.

    `weights`: bytes in the tar.
    """
    count = len(order)
    shard, row, number = np.full(count, -1), np.full(count, -1), np.full(count, -1)
    kept_here = is_kept[order]
    if not kept_here.any():
        return shard, row, number
    starts = _shard_starts(weights[order[kept_here]], config=config)
    seen = np.cumsum(kept_here)
    sample = np.minimum(seen - kept_here, seen[-1] - 1)  # index of the kept input that it goes with
    shards = np.searchsorted(starts, sample, side="right") - 1
    shard[order] = shards
    row[order] = np.arange(count) - np.searchsorted(shards, shards, side="left")
    number[order] = np.where(kept_here, sample - starts[shards], -1)
    return shard, row, number


def _shard_starts(weights: Ints, *, config: ShardConfig) -> Ints:
    """The first sample of each shard."""
    ends = np.cumsum(weights)
    starts = [0]
    while True:
        start = starts[-1]
        before = int(ends[start - 1]) if start else 0
        full = int(np.searchsorted(ends, before + config.max_bytes, side="right"))
        following = min(max(full, start + 1), start + config.max_samples)
        if following >= len(weights):
            return np.array(starts)
        starts.append(following)


def _column_kinds(tables: ChunkTables, *, is_kept: NDArray[np.bool_]) -> dict[str, ColumnKind]:
    """All extra columns, sorted by name. A column is numeric or boolean only if all its values are."""
    types: dict[str, set[type]] = {}
    filled: dict[str, int] = {}
    for position, extra in _extras(tables):
        for name, value in extra.items():
            seen = types.setdefault(name, set())
            if value is not None:
                seen.add(type(value))
                filled[name] = filled.get(name, 0) + bool(is_kept[position])
    kept_count = int(is_kept.sum())
    kinds = {frozenset({bool}): pa.bool_(), frozenset({int}): pa.int64()}
    floats = dict.fromkeys((frozenset({float}), frozenset({int, float})), pa.float64())
    columns: dict[str, ColumnKind] = {}
    for name in sorted(types):
        kind = (kinds | floats).get(frozenset(types[name]), pa.string())
        columns[name] = ColumnKind(table=kind, is_number_in_json=kind != pa.string() and filled.get(name, 0) == kept_count)
    return columns


def _find_schema_mismatches(tables: ChunkTables, *, facts: _Facts, columns: ExtraColumns) -> tuple[dict[int, str], tuple[str, ...]]:
    """(position → problem of inputs that do not fit these columns, names of columns that the corpus does not have)."""
    schema_mismatches: dict[int, str] = {}
    if columns.has_classes:
        unlabelled = np.flatnonzero((facts.reason == 0) & ~facts.has_label)
        schema_mismatches = dict.fromkeys(unlabelled.tolist(), "no class, which every sample of the corpus has")
    others: set[str] = set()
    for position, extra in _extras(tables):
        others |= extra.keys() - columns.kinds.keys()
        if facts.reason[position]:
            continue
        for name, kind in columns.kinds.items():
            value = extra.get(name)
            if not kind.holds(value):
                schema_mismatches[position] = (
                    f"{name} is {json.dumps(value)[:80]}, where every sample of the corpus has a value of type {kind.table}"
                )
    return schema_mismatches, tuple(sorted(others))


def _extras(tables: ChunkTables) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, extra columns) of all inputs."""
    for number, table in enumerate(tables):
        for index, extra in enumerate(table.column("extra").to_pylist()):
            yield number * CHUNK_SIZE + index, {} if extra == "{}" else json.loads(extra)
