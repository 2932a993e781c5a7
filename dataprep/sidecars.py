"""Writing sidecar tables (`pipeline.sidecars`): a table beside every shard of a finished corpus, and the list of them, written last.

A shard's table appears whole or not at all, and says in its metadata what it was made of: a run that was killed goes on with the shards
that lack one. The tars and tables of the corpus are not touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.files import LOCK, claimed, publish, publish_text
from pipeline.digests import file_digest
from pipeline.errors import one_line
from pipeline.index import Corpus
from pipeline.remote import is_remote
from pipeline.sidecars import FORMAT, SIDECARS, TEXT_COLUMNS, Sidecar, SidecarShard, read_sidecars

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_IDENTITY = b"tim_sidecar"
# What a corpus's tables say of where and what its samples are; the rest may be said anew.
RESERVED = {
    "key",
    "source",
    "path",
    "status",
    "reason",
    "detail",
    "width",
    "height",
    "original_width",
    "original_height",
    "sha256",
    "phash",
}
RESERVED |= {f"{member}_{what}" for member in ("image", "text", "cls", "json") for what in ("offset", "length")}


@contextmanager
def opened_for_sidecars(path: str | Path, *, name: str) -> Iterator[Corpus]:
    """A local corpus without its sidecar `name`, locked against a second run that writes into it.

    Raises ValueError, in one line, if it is none, and RuntimeError if another run writes into it.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name {name}: is no name for a sidecar: lower-case letters, digits, - and _ make one, at most 40")
    if is_remote(path):
        raise ValueError(f"{path}: sidecars are written into a local folder: work on a copy of the tables, or mount it")
    corpus = Corpus.open(path, check_shards=False, without=name, partial=True)
    with claimed(corpus.path) as work:
        try:
            yield corpus
        finally:
            (work / LOCK).unlink()
            if not any(work.iterdir()):
                work.rmdir()


def write_sidecar(
    corpus: Corpus,
    *,
    name: str,
    schema: pa.Schema,
    identity: Mapping[str, Any],
    make: Callable[[int], pa.Table],
    progress: Callable[[int], None] = lambda samples: None,
) -> Sidecar:
    """Write the sidecar `name` of a corpus that was opened without it, as the last one in the list; shards that have a table of the
    same identity are left alone.

    Args:
        schema: of its tables, without `key`.
        identity: what the tables follow from besides the corpus; JSON-able.
        make: shard → a table of `schema` with a row for each of its samples, in their order.
        progress: told the number of samples whose shards are done.
    """
    for other in corpus.sidecars:
        both = sorted(set(other.columns) & set(schema.names) - set(TEXT_COLUMNS))
        if both:
            raise ValueError(f"{corpus.folder}: its sidecar '{other.name}' has a column {both[0]}: to replace it, give --name {other.name}")
    shards: dict[str, SidecarShard] = {}
    done = 0
    for number, shard in enumerate(corpus.shards):
        table = f"{shard.table.removesuffix('.parquet')}.{name}.parquet"
        made_of = hashlib.sha256(json.dumps([FORMAT, shard.digest, identity], sort_keys=True).encode()).hexdigest()
        if not _is_made_of(corpus.path / table, made_of):
            _write(corpus, number, make(number).select(schema.names).cast(schema), table=table, made_of=made_of)
        texts = _texts_name(table) if "captions" in schema.names else ""
        shards[shard.table] = SidecarShard(
            table=table,
            sha256=file_digest(corpus.path / table),
            of=shard.table_digest,
            texts=texts,
            texts_bytes=os.path.getsize(corpus.path / texts) if texts else 0,
            texts_sha256=file_digest(corpus.path / texts) if texts else "",
        )
        done += shard.count
        progress(done)
    columns = tuple(schema.names) + tuple(column for column in TEXT_COLUMNS if "captions" in schema.names and column not in schema.names)
    sidecar = Sidecar(name=name, columns=columns, shards=shards)
    _publish_list(corpus.path, [*corpus.sidecars, sidecar])
    return sidecar


def remove_sidecar(path: Path, *, name: str) -> None:
    """Take a sidecar out of the list, then delete its files. Raises ValueError if there is none of this name."""
    sidecars = read_sidecars(str(path))
    gone = next((sidecar for sidecar in sidecars if sidecar.name == name), None)
    if gone is None:
        raise ValueError(f"{path}: has no sidecar '{name}'; there are: {', '.join(each.name for each in sidecars) or 'none'}")
    _publish_list(path, [sidecar for sidecar in sidecars if sidecar is not gone])
    for shard in gone.shards.values():
        for file in filter(None, (shard.table, shard.texts)):
            (path / file).unlink(missing_ok=True)


def sidecar_files(corpus: Path) -> set[str]:
    """The names of all tables and caption files of a corpus's sidecars."""
    shards = [shard for sidecar in read_sidecars(str(corpus)) for shard in sidecar.shards.values()]
    return {name for shard in shards for name in (shard.table, shard.texts) if name}


def check_sidecars(corpus: Path) -> Iterator[str]:
    """Everything that is wrong with a corpus's sidecars, one sentence each."""
    try:
        opened = Corpus.open(corpus, check_shards=False)
        for sidecar in opened.sidecars:
            for number, shard in enumerate(opened.shards):
                yield from _check_shard(opened, number, beside=sidecar.of(shard.table, digest=shard.table_digest, folder=str(corpus)))
                opened.read(number, columns=sidecar.columns)
    except ValueError as error:
        yield one_line(error)


def _check_shard(corpus: Corpus, number: int, *, beside: SidecarShard) -> Iterator[str]:
    for name, expected in ((beside.table, beside.sha256), (beside.texts, beside.texts_sha256)):
        if name and not (corpus.path / name).is_file():
            yield f"{name}: is missing"
        elif name and file_digest(corpus.path / name) != expected:
            yield f"{name}: its digest is not that of {SIDECARS}: the file was changed or damaged"


def _write(corpus: Corpus, number: int, columns: pa.Table, *, table: str, made_of: str) -> None:
    """A shard's table, after its file of captions if it has some."""
    keys = corpus.read(number, columns=("key",)).column("key")
    if "captions" in columns.column_names:
        columns = _write_texts(corpus.path / _texts_name(table), columns)
    found = columns.add_column(0, "key", keys)
    found = found.replace_schema_metadata({_IDENTITY: made_of})
    buffer = io.BytesIO()
    pq.write_table(found, buffer, compression="zstd", row_group_size=max(1, found.num_rows))
    with publish(corpus.path / table) as stream:
        stream.write(buffer.getbuffer())


def _write_texts(path: Path, columns: pa.Table) -> pa.Table:
    """The captions as lines of JSON, and the table with where they lie."""
    offsets: list[int] = []
    lengths: list[int] = []
    with publish(path) as stream:
        for captions in columns.column("captions").to_pylist():
            line = json.dumps({"captions": captions}, ensure_ascii=False).encode("utf-8")
            offsets.append(stream.tell())
            lengths.append(len(line))
            stream.write(line + b"\n")
    places = {"json_offset": pa.array(offsets, pa.int64()), "json_length": pa.array(lengths, pa.int64())}
    nowhere = pa.nulls(len(offsets), pa.int64())
    for name, values in {"text_offset": nowhere, "text_length": nowhere, **places}.items():
        columns = columns.append_column(name, values)
    return columns


def _is_made_of(table: Path, made_of: str) -> bool:
    try:
        return (pq.read_schema(table).metadata or {}).get(_IDENTITY) == made_of.encode()
    except (OSError, pa.ArrowException):
        return False


def _texts_name(table: str) -> str:
    return table.removesuffix(".parquet") + ".jsonl"


def _publish_list(corpus: Path, sidecars: Sequence[Sidecar]) -> None:
    listed = [{**asdict(sidecar), "shards": {of: asdict(shard) for of, shard in sidecar.shards.items()}} for sidecar in sidecars]
    publish_text(corpus / SIDECARS, json.dumps({"format": FORMAT, "sidecars": listed}, indent=1, ensure_ascii=False) + "\n")
