"""What pass 1 found, on disk: tables of 1,024 rows. A chunk is the unit of resume: its table appears when all of it is examined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataprep.files import publish

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
        ("thumbnail", pa.binary()),  # of some rejected pictures
        ("extra", pa.string()),  # JSON object
        ("text_bytes", pa.int64()),  # at least what the texts take in the shard's JSON and caption members
        ("input_bytes", pa.int64()),
        # Where pass 2 finds the bytes to store: in the source's file, or in a spool file beside the tables.
        ("is_spooled", pa.bool_()),
        ("file", pa.binary()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)


def write_chunk(table: Path, rows: list[dict[str, Any]]) -> None:
    """Write a chunk's rows, uncompressed, so that they can be mapped."""
    with publish(table) as stream, pa.ipc.new_file(stream, CHUNK_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA))


class ChunkTables:
    """The tables of pass 1 as one list of rows, mapped from disk rather than loaded."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._opened: dict[int, pa.Table] = {}

    def column(self, name: str) -> list[Any]:
        return [value for chunk in range(len(self.paths)) for value in self._table(chunk).column(name).to_pylist()]

    def tables(self, *names: str) -> Iterator[pa.Table]:
        """Some columns of all rows, a chunk at a time."""
        return (self._table(chunk).select(names) for chunk in range(len(self.paths)))

    def rows(self, positions: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Position → row; each chunk is read once however the positions are ordered."""
        by_chunk: dict[int, list[int]] = {}
        for position in positions:
            by_chunk.setdefault(position // CHUNK_SIZE, []).append(position)
        found: dict[int, dict[str, Any]] = {}
        for chunk, members in by_chunk.items():
            local = self._table(chunk).take(pa.array([position % CHUNK_SIZE for position in members]))
            found.update(zip(members, local.to_pylist(), strict=True))
        return found

    def _table(self, chunk: int) -> pa.Table:
        if chunk not in self._opened:
            self._opened[chunk] = pa.ipc.open_file(pa.memory_map(str(self.paths[chunk]))).read_all()
        return self._opened[chunk]
