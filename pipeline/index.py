"""A corpus as training sees it: its manifest, and the tables of its kept samples, read one shard at a time.

Columns and files are those that `tim prepare` writes (DESIGN §4). Row group i of `index.parquet` belongs to shard i, so that memory stays
bounded by the shards that a plan has open, however many rows there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a corpus: path, number of samples, bytes."""

    path: str
    count: int
    bytes: int


class Corpus:
    """A prepared corpus. Make one with `Corpus.open`."""

    def __init__(self, *, path: Path, name: str, digest: str, shards: tuple[Shard, ...], index_path: Path) -> None:
        self.path = path
        self.name = name
        self.digest = digest
        self.shards = shards
        self.count = sum(shard.count for shard in shards)
        self._index_path = index_path

    @classmethod
    def open(cls, path: str | Path, *, name: str | None = None) -> Corpus:
        """Open the corpus in folder `path`, under the `name` of its manifest unless another is given.

        Raises ValueError, in one line, if it is no corpus, is of an unknown format, or lacks or mismatches one of its files.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        shards = []
        try:
            for shard in manifest["shards"]:
                file = folder / shard["name"]
                _expect_size(file, size=shard["bytes"])
                shards.append(Shard(path=str(file), count=shard["count"], bytes=shard["bytes"]))
            index_path = folder / manifest["index"]["name"]
            if not index_path.is_file():
                raise ValueError(f"corpus {folder} lacks {index_path.name}: restore the file or run `tim prepare` again")
            corpus_name = manifest["name"] if name is None else name
            contents = {key: [shard[key] for shard in manifest["shards"]] for key in ("name", "count", "sha256", "table_sha256")}
            digest = hashlib.sha256(json.dumps([contents, manifest["index"]["sha256"]], sort_keys=True).encode()).hexdigest()
        except (KeyError, TypeError) as error:
            raise ValueError(f"corpus {folder}: manifest.json is damaged ({error}): run `tim prepare` again") from error
        return cls(path=folder, name=corpus_name, digest=digest, shards=tuple(shards), index_path=index_path)

    def read(self, shard: int, *, columns: Sequence[str]) -> pa.Table:
        """The kept rows of one shard, in the order of the tar. Raises ValueError if the index is damaged or lacks a column."""
        try:
            table = self._index.read_row_group(shard, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self._index_path} cannot be read ({_one_line(error)}): run `tim verify` on the corpus") from error
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise ValueError(f"{self._index_path} has no column '{missing[0]}': run `tim prepare` again with this version")
        return table

    def labels(self) -> pa.ChunkedArray:
        """The class of every kept row, null where it has none: int32. Raises ValueError if the index is damaged or lacks the column."""
        try:
            return self._index.read(columns=["label"], use_threads=False).column("label")
        except (KeyError, OSError, pa.ArrowException) as error:
            raise ValueError(f"{self._index_path} has no readable classes ({_one_line(error)}): run `tim verify` on the corpus") from error

    @cached_property
    def _index(self) -> pq.ParquetFile:
        try:
            index = pq.ParquetFile(self._index_path)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self._index_path} is not a parquet file ({_one_line(error)}): run `tim prepare` again") from error
        if index.num_row_groups != len(self.shards) or index.metadata.num_rows != self.count:
            raise ValueError(
                f"{self._index_path} has {index.metadata.num_rows} rows in {index.num_row_groups} groups, manifest.json says {self.count} "
                f"in {len(self.shards)} shards: they are not of one corpus, run `tim prepare` again"
            )
        return index


def _read_manifest(folder: Path) -> dict:
    file = folder / "manifest.json"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a corpus: there is no such folder")
    if not file.is_file():
        raise ValueError(f"{folder} is not a corpus: it has no manifest.json; `tim prepare SOURCE --out CORPUS` makes one")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): run `tim prepare` again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file} is of format {found!r}, this version of tim reads format {FORMAT}: use the version that wrote it")
    return manifest


def _expect_size(file: Path, *, size: int) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"corpus {file.parent} lacks the shard {file.name}: restore the file or run `tim prepare` again") from error
    if found != size:
        raise ValueError(f"shard {file} has {found} bytes, manifest.json says {size}: restore the file or run `tim prepare` again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
