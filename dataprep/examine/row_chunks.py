"""Rows of pass 1 on disk, in tables of 1,024. A chunk is the unit of resume: its table is written once all its inputs are examined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.storage.atomic import publish

CHUNK_SIZE = 1024

CHUNK_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("path", pa.string()),
        ("reason", pa.string()),  # "" while the input may be kept
        ("detail", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("thumbnail", pa.binary()),  # of some rejected images
        ("extra", pa.string()),  # JSON object
        ("text_bytes", pa.int64()),  # upper bound of the texts' bytes in the shard's JSON and caption members
        ("input_bytes", pa.int64()),
        # Where pass 2 finds the bytes to store: in the source's file, or in a spool file beside the tables.
        ("is_spooled", pa.bool_()),
        ("file", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        # The loss mask: its name in the source ("" without one), and where it is in a spool file.
        ("mask_path", pa.string()),
        ("mask_file", pa.binary()),
        ("mask_start", pa.int64()),
        ("mask_bytes", pa.int64()),
    ]
)


def chunk_path(work: Path, number: int) -> Path:
    return work / f"chunk-{number:06d}.arrow"


def write_chunk(table: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a chunk, uncompressed, so that they can be memory-mapped."""
    with publish(table) as stream, pa.ipc.new_file(stream, CHUNK_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA))


class ChunkTables:
    """The tables of pass 1 as one list of rows, memory-mapped one table at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.count = (len(paths) - 1) * CHUNK_SIZE + open_table(paths[-1]).num_rows if paths else 0

    def __iter__(self) -> Iterator[pa.Table]:
        return map(open_table, self.paths)

    def names(self, positions: Iterable[int]) -> dict[int, str]:
        """Position → "SOURCE/PATH" of the input. Each table is opened once, whatever the order of the positions."""
        by_chunk: dict[int, list[int]] = {}
        for position in sorted(positions):
            by_chunk.setdefault(position // CHUNK_SIZE, []).append(position)
        found: dict[int, str] = {}
        for chunk, members in by_chunk.items():
            local = pa.array([position % CHUNK_SIZE for position in members])
            rows = open_table(self.paths[chunk]).select(["source", "path"]).take(local).to_pylist()
            found.update((position, f"{row['source']}/{row['path']}") for position, row in zip(members, rows, strict=True))
        return found


def open_table(path: Path) -> pa.Table:
    """A memory-mapped Arrow file."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
