"""Regroup the rows of pass 1 by shard, and add the decisions of the plan.

Tables hold rows in source order; shards hold them in shuffled order. To write a shard without opening every table, the tables are read
once in blocks of bounded size, and the rows of each block are sorted by shard into a group file with one record batch per shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataprep.examine.row_chunks import CHUNK_SCHEMA, CHUNK_SIZE, ChunkTables
from dataprep.row_schema import TAKEN_DOWN
from dataprep.shards.layout import DUPLICATE, DUPLICATE_OF, NEAR_DUPLICATE, SCHEMA_MISMATCH, TAKEN_DOWN_COPY, Plan
from pipeline.storage.atomic import publish

BLOCK_BYTES = 64 << 20
SLICE_ROWS = 1024
_DECIDED = [("row", pa.int64()), ("key", pa.string()), ("duplicate_of", pa.string()), ("near_duplicate_of", pa.string())]
GROUP_SCHEMA = pa.schema([*CHUNK_SCHEMA, *_DECIDED])


def group_rows(tables: ChunkTables, *, plan: Plan, work: Path) -> tuple[Path, ...]:
    """Write group files into `work`: the rows of `CHUNK_SCHEMA` with `key` ("" if rejected), `row` in the shard's table, the images that
    they duplicate, and the plan's reasons for rejection."""
    paths = []
    for start, block in _blocks(tables):
        path = work / f"group-{len(paths):06d}.arrow"
        positions = np.arange(start, start + block.num_rows)
        order = np.lexsort((plan.row[positions], plan.shard[positions]))
        decided = _decide(block, positions=positions, plan=plan, tables=tables)
        grouped = pa.RecordBatch.from_struct_array(decided.take(pa.array(order)).to_struct_array().combine_chunks())
        ends = np.searchsorted(plan.shard[positions][order], np.arange(plan.shards), side="right").tolist()
        with publish(path) as stream, pa.ipc.new_file(stream, GROUP_SCHEMA) as writer:
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                writer.write_batch(grouped.slice(begin, end - begin))
        paths.append(path)
    return tuple(paths)


def rows_of_shard(groups: tuple[Path, ...], *, shard: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a shard (counted from 0) in table order, 1,024 at a time."""
    table = pa.Table.from_batches([pa.ipc.open_file(pa.memory_map(str(path))).get_batch(shard) for path in groups], GROUP_SCHEMA)
    order = np.argsort(table.column("row").to_numpy())
    for start in range(0, len(order), SLICE_ROWS):
        yield table.take(pa.array(order[start : start + SLICE_ROWS])).to_pylist()


def _blocks(tables: ChunkTables) -> Iterator[tuple[int, pa.Table]]:
    """(position of the first row, rows) of blocks of adjacent tables."""
    block: list[pa.Table] = []
    size = start = 0
    for number, table in enumerate(tables):
        if block and size + table.nbytes > BLOCK_BYTES:
            yield start, pa.concat_tables(block)
            block, size, start = [], 0, number * CHUNK_SIZE
        block.append(table)
        size += table.nbytes
    if block:
        yield start, pa.concat_tables(block)


def _decide(block: pa.Table, *, positions: np.ndarray, plan: Plan, tables: ChunkTables) -> pa.Table:
    """The block's rows with the decisions of the plan."""
    reasons, details = block.column("reason").to_pylist(), block.column("detail").to_pylist()
    exact, near = plan.exact[positions].tolist(), plan.near[positions].tolist()
    rejecting = [(exact, DUPLICATE), *([(near, NEAR_DUPLICATE)] if plan.drops_near else [])]
    first = len(plan.references)
    names = tables.names({original - first for originals, _ in rejecting for original in originals if original >= first})
    for originals, reason in rejecting:
        for row, original in enumerate(originals):
            if original >= 0:
                name = plan.references.id(original) if original < first else names[original - first]
                reasons[row], details[row] = reason, f"{DUPLICATE_OF[reason]} {name}"
    start = int(positions[0])
    for position in positions[np.isin(positions, list(plan.schema_mismatches))].tolist():
        reasons[position - start], details[position - start] = SCHEMA_MISMATCH, plan.schema_mismatches[position]
    captions, lists, extras = (block.column(name).to_pylist() for name in ("caption", "captions", "extra"))
    for position in positions[plan.taken_down[positions]].tolist():
        row = position - start
        reasons[row], details[row] = TAKEN_DOWN, TAKEN_DOWN_COPY
        captions[row], lists[row], extras[row] = "", [], "{}"
    texts = {
        "caption": captions,
        "extra": extras,
        "reason": reasons,
        "detail": details,
        "key": map(plan.key, positions.tolist()),
        "duplicate_of": map(plan.kept_for, exact),
        "near_duplicate_of": map(plan.kept_for, near),
    }
    columns = dict(zip(block.column_names, block.columns, strict=True)) | {"row": pa.array(plan.row[positions])}
    columns["captions"] = pa.array(lists, pa.list_(pa.string()))
    return pa.table(columns | {name: pa.array(list(values), pa.string()) for name, values in texts.items()}, schema=GROUP_SCHEMA)
