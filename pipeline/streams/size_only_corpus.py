"""A corpus of image sizes only, for planning before there are images: no captions, no classes, no files.

The sizes come from a table, or from a function that generates those of any shard, so that plans over a billion rows can be tested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.corpus import Corpus, CorpusShard
from pipeline.cost import Ints
from pipeline.errors import one_line

ROWS_PER_SHARD = 10_000

Sizes = tuple[Ints, Ints]
"""Heights and widths in pixels, (n,) each."""


class SizeCorpus(Corpus):
    """A corpus of `count` sizes; `sizes(first, last)` gives those of rows first … last − 1. Keys are row numbers."""

    def __init__(self, *, name: str, digest: str, count: int, sizes: Callable[[int, int], Sizes]) -> None:
        counts = [min(ROWS_PER_SHARD, count - first) for first in range(0, count, ROWS_PER_SHARD)]
        shards = tuple(CorpusShard(path="", count=rows, bytes=0, sha256="", table="", digest="", table_digest="") for rows in counts)
        super().__init__(folder=name, name=name, digest=digest, shards=shards, qualified=False, features=None)
        self._sizes = sizes

    def read(self, shard: int, *, columns: Sequence[str]) -> pa.Table:
        """The rows of one shard; columns other than key, height and width are null."""
        first = shard * ROWS_PER_SHARD
        last = first + self.shards[shard].count
        heights, widths = self._sizes(first, last)
        known = {"key": pa.array([str(row) for row in range(first, last)]), "height": pa.array(heights), "width": pa.array(widths)}
        types = {"captions": pa.list_(pa.string())}
        return pa.table({name: known[name] if name in known else pa.nulls(last - first, types.get(name, pa.int64())) for name in columns})


def read_sizes(file: Path) -> SizeCorpus:
    """Read the columns `width` and `height` of a parquet file. Raises ValueError if that fails or a value is null."""
    try:
        table = pq.read_table(file, columns=["height", "width"])
        heights, widths = (table.column(name).cast(pa.int64()).to_numpy() for name in ("height", "width"))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{file}: not a parquet file with integer columns width and height ({one_line(error)})") from error
    missing = sum(table.column(name).null_count for name in table.column_names)
    if missing:
        raise ValueError(f"{file}: {missing} widths or heights are null: every row needs both")
    digest = hashlib.sha256(heights.tobytes() + widths.tobytes()).hexdigest()
    return SizeCorpus(
        name=file.stem, digest=digest, count=len(heights), sizes=lambda first, last: (heights[first:last], widths[first:last])
    )
