"""Write sidecars (`pipeline.corpus.sidecars`): one table for each shard of a finished corpus, and their list, which is written last.

Tables are written atomically, with a digest of their inputs in the metadata: a killed run resumes with the shards that lack one. The tars
and tables of the corpus are not modified.
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
# Columns that locate and identify samples. Sidecars may replace all others.
RESERVED = {
    *("key", "source", "path", "status", "reason", "detail", "width", "height", "original_width", "original_height", "sha256", "phash"),
    *(f"{member}_{what}" for member in MEMBERS for what in ("offset", "length")),
}


@contextmanager
def opened_for_sidecars(path: str | Path, *, name: str) -> Iterator[tuple[Corpus, Store]]:
    """A corpus in a folder or at a URL, without its sidecar `name`, and its store, whose `scratch` is a folder for temporary files. Locked
    against other runs on this machine.

    Raises ValueError if it is not a corpus or cannot be written to, and RuntimeError if another run is writing to it.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name {name}: is not a name for a sidecar: use at most 40 lower-case letters, digits, - and _")
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
    """Write the sidecar `name` of a corpus that was opened without it, as the last one in the list. Shards with a table of the same
    identity are skipped.

    Args:
        store: of the corpus's files.
        schema: of its tables, without `key`.
        identity: what the tables depend on besides the corpus; JSON-serializable.
        make: shard → a table of `schema` with one row per sample, in order.
        merged: columns that other sidecars may have, too, because `make` includes their values.
        progress: called with the number of samples in finished shards.
    """
    for other in corpus.sidecars:
        both = sorted(set(other.columns) & set(schema.names) - {*TEXT_COLUMNS, *merged})
        if both:
            raise ValueError(f"{corpus.folder}: its sidecar '{other.name}' has a column {both[0]}: to replace it, give name={other.name}")
    shards: dict[str, SidecarShard] = {}
    done = 0
    for number, shard in enumerate(corpus.shards):
        table = f"{shard.table.removesuffix('.parquet')}.{name}.parquet"
        inputs_digest = json_digest([FORMAT, shard.digest, identity])
        texts = f"{table.removesuffix('.parquet')}.jsonl" if "captions" in schema.names else ""
        files = _finished(store, table=table, texts=texts, inputs_digest=inputs_digest)
        if files is None:
            keys = corpus.read(number, columns=("key",)).column("key")
            columns = make(number).select(schema.names).cast(schema).add_column(0, "key", keys)
            files = _write(store, columns, table=table, texts=texts, inputs_digest=inputs_digest)
        shards[shard.table] = _sidecar_shard(files, table=table, texts=texts, of=shard.table_digest)
        done += shard.count
        progress(done)
    columns = tuple(schema.names) + tuple(column for column in TEXT_COLUMNS if "captions" in schema.names and column not in schema.names)
    sidecar = Sidecar(name=name, columns=columns, shards=shards)
    _publish_list(store, [*corpus.sidecars, sidecar])
    return sidecar


def extended_sidecars(store: Store, *, shards: Sequence[ShardEntry], first: int) -> tuple[Sidecar, ...]:
    """Sidecars of a corpus whose `shards` from number `first` on are new. Each sidecar gets tables without values for them: new samples
    keep their own captions until the command that made the sidecar is run again. The list of sidecars is not written.
    """
    sidecars = read_sidecars(store.location)
    for number, sidecar in enumerate(sidecars):
        schema = _own_schema(store, sidecar=sidecar)
        known = {shard.table for shard in shards[:first]}
        listed = {of: entry for of, entry in sidecar.shards.items() if of in known}
        for shard in shards[first:]:
            rows = kept_rows(pq.ParquetFile(io.BytesIO(store.read(shard.table))).read(columns=["key", "caption", "captions"]))
            own = {name: rows.column(name) for name in ("key", "caption", "captions")}
            columns = pa.table([own.get(each.name, pa.nulls(rows.num_rows, each.type)) for each in schema], schema=schema)
            listed[shard.table] = _write_empty(store, columns, shard=shard, name=sidecar.name)
        sidecars = (*sidecars[:number], replace(sidecar, shards=listed), *sidecars[number + 1 :])
    return sidecars


def _own_schema(store: Store, *, sidecar: Sidecar) -> pa.Schema:
    """Schema of a sidecar's tables, without the offsets of captions. Raises ValueError if no table can be read."""
    remedy = f"run the command that made it again, or remove {sidecar.name} with `tim annotate`"
    entry = next(iter(sidecar.shards.values()), None)
    if entry is None:
        raise ValueError(f"{store.location}: its sidecar '{sidecar.name}' has no tables: {remedy}")
    try:
        found = pq.read_schema(io.BytesIO(store.read(entry.table)))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{store.location}: {entry.table} of its sidecar '{sidecar.name}' is damaged: {one_line(error)}: {remedy}"
        ) from error
    return pa.schema([each for each in found if each.name in ("caption", "captions") or each.name not in TEXT_COLUMNS])


def _write_empty(store: Store, columns: pa.Table, *, shard: ShardEntry, name: str) -> SidecarShard:
    table = f"{shard.table.removesuffix('.parquet')}.{name}.parquet"
    texts = f"{table.removesuffix('.parquet')}.jsonl" if "captions" in columns.column_names else ""
    files = _write(store, columns, table=table, texts=texts, inputs_digest=json_digest([FORMAT, shard.table_sha256, "nothing said yet"]))
    return _sidecar_shard(files, table=table, texts=texts, of=shard.table_sha256)


def _sidecar_shard(files: _Files, *, table: str, texts: str, of: str) -> SidecarShard:
    return SidecarShard(
        table=table,
        sha256=_digest(files.table),
        of=of,
        texts=texts,
        texts_bytes=len(files.texts),
        texts_sha256=_digest(files.texts) if texts else "",
    )


def remove_sidecar(path: str | Path, *, name: str) -> None:
    """Remove a sidecar from the list, then delete its files. Raises ValueError if it does not exist."""
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
    """Names of all tables and caption files of the sidecars."""
    shards = [shard for sidecar in read_sidecars(str(corpus)) for shard in sidecar.shards.values()]
    return {name for shard in shards for name in (shard.table, shard.texts) if name}


def check_sidecars(corpus: Path) -> Iterator[str]:
    """All problems of the sidecars of a corpus, one sentence each."""
    try:
        opened = Corpus.open(corpus, check_shards=False)
        for sidecar in opened.sidecars:
            for number, shard in enumerate(opened.shards):
                yield from _check_shard(opened, number, entry=sidecar.of(shard.table, digest=shard.table_digest, folder=str(corpus)))
                opened.read(number, columns=sidecar.columns)
    except ValueError as error:
        yield one_line(error)


def _check_shard(corpus: Corpus, number: int, *, entry: SidecarShard) -> Iterator[str]:
    for name, expected in ((entry.table, entry.sha256), (entry.texts, entry.texts_sha256)):
        if name and not (corpus.path / name).is_file():
            yield f"{name}: is missing"
        elif name and file_digest(corpus.path / name) != expected:
            yield f"{name}: its digest does not match {SIDECARS}: the file was changed or damaged"


class _Files(NamedTuple):
    """Content of a shard's table, and of its caption file, if any."""

    table: bytes
    texts: bytes


def _finished(store: Store, *, table: str, texts: str, inputs_digest: str) -> _Files | None:
    """The files of a shard if they exist and were made from the same inputs, else None."""
    try:
        found = store.read(table)
        if (pq.read_schema(io.BytesIO(found)).metadata or {}).get(_IDENTITY) != inputs_digest.encode():
            return None
        return _Files(found, store.read(texts) if texts else b"")
    except (OSError, pa.ArrowException):
        return None


def _write(store: Store, columns: pa.Table, *, table: str, texts: str, inputs_digest: str) -> _Files:
    """Write the caption file of a shard, if any, then its table."""
    text = b""
    if texts:
        lines = [json.dumps({"captions": captions}, ensure_ascii=False).encode() for captions in columns.column("captions").to_pylist()]
        columns = _with_offsets(columns, lines=lines)
        text = b"".join(line + b"\n" for line in lines)
        with store.publish(texts) as stream:
            stream.write(text)
    buffer = io.BytesIO()
    columns = columns.replace_schema_metadata({_IDENTITY: inputs_digest})
    pq.write_table(columns, buffer, compression="zstd", row_group_size=max(1, columns.num_rows))
    with store.publish(table) as stream:
        stream.write(buffer.getbuffer())
    return _Files(buffer.getvalue(), text)


def _with_offsets(columns: pa.Table, *, lines: Sequence[bytes]) -> pa.Table:
    """Add the offsets and lengths of the captions in a file of these lines."""
    starts = [0, *accumulate(len(line) + 1 for line in lines)][:-1]
    empty = pa.nulls(len(lines), pa.int64())
    offsets = {"json_offset": pa.array(starts, pa.int64()), "json_length": pa.array([len(line) for line in lines], pa.int64())}
    for name, values in {"text_offset": empty, "text_length": empty, **offsets}.items():
        columns = columns.append_column(name, values)
    return columns


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _publish_list(store: Store, sidecars: Sequence[Sidecar]) -> None:
    store.publish_text(SIDECARS, listed_sidecars(sidecars))


def listed_sidecars(sidecars: Sequence[Sidecar]) -> str:
    """The list of sidecars as JSON."""
    listed = [{**asdict(sidecar), "shards": {of: asdict(shard) for of, shard in sidecar.shards.items()}} for sidecar in sidecars]
    return json.dumps({"format": FORMAT, "sidecars": listed}, indent=1, ensure_ascii=False) + "\n"
