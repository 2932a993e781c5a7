"""Writing sidecar tables (`pipeline.corpus.sidecars`): a table beside every shard of a finished corpus, and the list of them, written last.

A shard's table appears whole or not at all, and says in its metadata what it was made of: a run that was killed goes on with the shards
that lack one. The tars and tables of the corpus are not touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.row_schema import MEMBERS
from dataprep.shards.manifest import kept_rows
from dataprep.shards.store import Store, open_store
from dataprep.shards.writer import ShardEntry
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.sidecars import FORMAT, SIDECARS, TEXT_COLUMNS, Sidecar, SidecarShard, read_sidecars
from pipeline.digests import file_digest, json_digest
from pipeline.errors import one_line
from pipeline.storage.atomic import LOCK, locked_work_folder

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_IDENTITY = b"tim_sidecar"
# What a corpus's tables say of where and what its samples are; the rest may be said anew.
RESERVED = {
    *("key", "source", "path", "status", "reason", "detail", "width", "height", "original_width", "original_height", "sha256", "phash"),
    *(f"{member}_{what}" for member in MEMBERS for what in ("offset", "length")),
}


@contextmanager
def opened_for_sidecars(path: str | Path, *, name: str) -> Iterator[tuple[Corpus, Store]]:
    """A corpus in a folder or at a URL without its sidecar `name`, and the store of its files, whose `scratch` is a folder for what is
    needed meanwhile; locked against a second run on this machine that writes into it.

    Raises ValueError, in one line, if it is none or cannot be written to, and RuntimeError if another run writes into it.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name}: is no name for a sidecar: lower-case letters, digits, - and _ make one, at most 40")
    store, work = open_store(path, work=None)
    corpus = Corpus.open(path, check_shards=False, without=name, partial=True)
    with locked_work_folder(work, place=store.location, folder=None if store.is_remote else corpus.path):
        try:
            yield corpus, store
        finally:
            (work / LOCK).unlink()
            if not any(work.iterdir()):
                work.rmdir()


def write_sidecar(
    corpus: Corpus,
    *,
    store: Store,
    name: str,
    schema: pa.Schema,
    identity: Mapping[str, Any],
    make: Callable[[int], pa.Table],
    merged: Collection[str] = (),
    progress: Callable[[int], None] = lambda samples: None,
) -> Sidecar:
    """Write the sidecar `name` of a corpus that was opened without it, as the last one in the list; shards that have a table of the
    same identity are left alone.

    Args:
        store: of the corpus's files.
        schema: of its tables, without `key`.
        identity: what the tables follow from besides the corpus; JSON-able.
        make: shard → a table of `schema` with a row for each of its samples, in their order.
        merged: columns that other sidecars may have, too, for `make` has taken over what these say.
        progress: told the number of samples whose shards are done.
    """
    for other in corpus.sidecars:
        both = sorted(set(other.columns) & set(schema.names) - {*TEXT_COLUMNS, *merged})
        if both:
            raise ValueError(f"{corpus.folder}: its sidecar '{other.name}' has a column {both[0]}: to replace it, give name={other.name}")
    shards: dict[str, SidecarShard] = {}
    done = 0
    for number, shard in enumerate(corpus.shards):
        table = f"{shard.table.removesuffix('.parquet')}.{name}.parquet"
        made_of = json_digest([FORMAT, shard.digest, identity])
        texts = f"{table.removesuffix('.parquet')}.jsonl" if "captions" in schema.names else ""
        files = _finished(store, table=table, texts=texts, made_of=made_of)
        if files is None:
            keys = corpus.read(number, columns=("key",)).column("key")
            columns = make(number).select(schema.names).cast(schema).add_column(0, "key", keys)
            files = _write(store, columns, table=table, texts=texts, made_of=made_of)
        shards[shard.table] = _described(files, table=table, texts=texts, of=shard.table_digest)
        done += shard.count
        progress(done)
    columns = tuple(schema.names) + tuple(column for column in TEXT_COLUMNS if "captions" in schema.names and column not in schema.names)
    sidecar = Sidecar(name=name, columns=columns, shards=shards)
    _publish_list(store, [*corpus.sidecars, sidecar])
    return sidecar


def extended_sidecars(store: Store, *, shards: Sequence[ShardEntry], first: int) -> tuple[Sidecar, ...]:
    """The sidecars of a corpus that got `shards` from number `first` on, for which each gets a table that says nothing: new samples have no
    values and their own captions until the command that made the sidecar is run again. The list of sidecars is not written.
    """
    sidecars = read_sidecars(store.location)
    for number, sidecar in enumerate(sidecars):
        schema = _own_schema(store, sidecar=sidecar)
        known = {shard.table for shard in shards[:first]}
        listed = {of: beside for of, beside in sidecar.shards.items() if of in known}
        for shard in shards[first:]:
            rows = kept_rows(pq.ParquetFile(io.BytesIO(store.read(shard.table))).read(columns=["key", "caption", "captions"]))
            own = {name: rows.column(name) for name in ("key", "caption", "captions")}
            columns = pa.table([own.get(each.name, pa.nulls(rows.num_rows, each.type)) for each in schema], schema=schema)
            listed[shard.table] = _written_beside(store, columns, shard=shard, name=sidecar.name)
        sidecars = (*sidecars[:number], replace(sidecar, shards=listed), *sidecars[number + 1 :])
    return sidecars


def _own_schema(store: Store, *, sidecar: Sidecar) -> pa.Schema:
    """Of a sidecar's tables, without where captions lie. Raises ValueError if there is none to be read."""
    remedy = f"run the command that made it again, or take it away with `tim annotate --remove {sidecar.name}`"
    beside = next(iter(sidecar.shards.values()), None)
    if beside is None:
        raise ValueError(f"{store.location}: its sidecar '{sidecar.name}' has no tables: {remedy}")
    try:
        found = pq.read_schema(io.BytesIO(store.read(beside.table)))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{store.location}: {beside.table} of its sidecar '{sidecar.name}' is damaged: {one_line(error)}: {remedy}"
        ) from error
    return pa.schema([each for each in found if each.name in ("caption", "captions") or each.name not in TEXT_COLUMNS])


def _written_beside(store: Store, columns: pa.Table, *, shard: ShardEntry, name: str) -> SidecarShard:
    table = f"{shard.table.removesuffix('.parquet')}.{name}.parquet"
    texts = f"{table.removesuffix('.parquet')}.jsonl" if "captions" in columns.column_names else ""
    files = _write(store, columns, table=table, texts=texts, made_of=json_digest([FORMAT, shard.table_sha256, "nothing said yet"]))
    return _described(files, table=table, texts=texts, of=shard.table_sha256)


def _described(files: _Files, *, table: str, texts: str, of: str) -> SidecarShard:
    return SidecarShard(
        table=table,
        sha256=_digest(files.table),
        of=of,
        texts=texts,
        texts_bytes=len(files.texts),
        texts_sha256=_digest(files.texts) if texts else "",
    )


def remove_sidecar(path: str | Path, *, name: str) -> None:
    """Take a sidecar out of the list, then delete its files. Raises ValueError if there is none of this name."""
    with opened_for_sidecars(path, name=name) as (corpus, store):
        sidecars = read_sidecars(corpus.folder)
        gone = next((sidecar for sidecar in sidecars if sidecar.name == name), None)
        if gone is None:
            raise ValueError(f"{path}: has no sidecar '{name}'; there are: {', '.join(each.name for each in sidecars) or 'none'}")
        _publish_list(store, corpus.sidecars)
        for shard in gone.shards.values():
            for file in filter(None, (shard.table, shard.texts)):
                store.remove(file)


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


class _Files(NamedTuple):
    """What is in a shard's table, and in its file of captions if it has some."""

    table: bytes
    texts: bytes


def _finished(store: Store, *, table: str, texts: str, made_of: str) -> _Files | None:
    """The files of a shard, if they are there and its table was made of the same."""
    try:
        found = store.read(table)
        if (pq.read_schema(io.BytesIO(found)).metadata or {}).get(_IDENTITY) != made_of.encode():
            return None
        return _Files(found, store.read(texts) if texts else b"")
    except (OSError, pa.ArrowException):
        return None


def _write(store: Store, columns: pa.Table, *, table: str, texts: str, made_of: str) -> _Files:
    """A shard's table, after its file of captions if it has some."""
    told = b""
    if texts:
        lines = [json.dumps({"captions": captions}, ensure_ascii=False).encode() for captions in columns.column("captions").to_pylist()]
        columns = _with_places(columns, lines=lines)
        told = b"".join(line + b"\n" for line in lines)
        with store.publish(texts) as stream:
            stream.write(told)
    buffer = io.BytesIO()
    columns = columns.replace_schema_metadata({_IDENTITY: made_of})
    pq.write_table(columns, buffer, compression="zstd", row_group_size=max(1, columns.num_rows))
    with store.publish(table) as stream:
        stream.write(buffer.getbuffer())
    return _Files(buffer.getvalue(), told)


def _with_places(columns: pa.Table, *, lines: Sequence[bytes]) -> pa.Table:
    """The table with where its captions lie in a file of these lines."""
    starts = [0, *accumulate(len(line) + 1 for line in lines)][:-1]
    nowhere = pa.nulls(len(lines), pa.int64())
    places = {"json_offset": pa.array(starts, pa.int64()), "json_length": pa.array([len(line) for line in lines], pa.int64())}
    for name, values in {"text_offset": nowhere, "text_length": nowhere, **places}.items():
        columns = columns.append_column(name, values)
    return columns


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _publish_list(store: Store, sidecars: Sequence[Sidecar]) -> None:
    store.publish_text(SIDECARS, listed_sidecars(sidecars))


def listed_sidecars(sidecars: Sequence[Sidecar]) -> str:
    """The text of the list."""
    listed = [{**asdict(sidecar), "shards": {of: asdict(shard) for of, shard in sidecar.shards.items()}} for sidecar in sidecars]
    return json.dumps({"format": FORMAT, "sidecars": listed}, indent=1, ensure_ascii=False) + "\n"
