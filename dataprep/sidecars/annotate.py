"""`tim annotate`: join columns and captions of a table to a finished corpus by key, sha256 or url. Tars are not modified.

The table may be larger than memory: its rows are stored in a database on disk, which each shard of the corpus queries for its own rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.sidecars.annotation_table import EXAMPLES, Damage, as_parquet
from dataprep.sidecars.writer import RESERVED, opened_for_sidecars, write_sidecar
from pipeline.corpus.captions import clean_captions
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.sidecars import TAKEDOWN
from pipeline.digests import file_digest
from pipeline.progress import Progress, no_progress

Captions = Literal["first", "last", "only"]

_BATCH = 10_000  # rows in memory
_NAMES_PER_QUERY = 900  # SQLite allows at least 999
_CAPTIONS = pa.list_(pa.string())


@dataclass(frozen=True, slots=True)
class Annotated:
    """Result: rows of the table, samples of the corpus, matched samples, and the new columns.

    `unmatched`: distinct values of `on` without a sample in the corpus. `damaged`: rows that cannot be read or have no value of `on`. The
    first ones of both are in `…_examples`.
    """

    sidecar: str
    rows: int
    samples: int
    matched: int
    columns: tuple[str, ...]
    unmatched: int
    unmatched_examples: tuple[str, ...]
    damaged: int
    damaged_examples: tuple[str, ...]


def annotate(
    corpus: str | Path,
    *,
    table: Path,
    on: Literal["key", "sha256", "url"],
    name: str | None = None,
    captions: Captions = "first",
    mark: str | None = None,
    progress: Progress = no_progress,
) -> Annotated:
    """Add the columns of a table (Parquet, CSV, TSV or JSON lines) to a corpus.

    Args:
        corpus: written by `tim prepare` or `tim index`, in a folder or at a URL.
        table: its columns `caption` and `captions` are new captions; all others except `on` are copied.
        on: the column by which rows and samples are joined; several samples may have the same url or sha256.
        name: of the sidecar, by default the table's file name. An earlier sidecar of this name is replaced.
        captions: whether new captions come before the old ones ("first"), after them ("last") or replace them ("only").
        mark: a column to set to true for every matched sample, such as "takedown".
        progress: called with ("read", rows read, rows) and ("annotate", samples done, samples).

    Samples without a row keep their values. Raises ValueError for a table that cannot be used, and RuntimeError if no row matches a sample;
    then nothing is written.
    """
    name = name or _default_name(table)
    with opened_for_sidecars(corpus, name=name) as (opened, store):
        database, converted = store.scratch / f"{name}.sqlite", store.scratch / f"{name}.table.parquet"
        database.unlink(missing_ok=True)
        try:
            parquet, damage = as_parquet(table, on=on, known=opened.schema, into=converted)
            new = _new_columns(parquet, of=opened, table=table, on=on, mark=mark)
            schema = _sidecar_schema(new, of=opened, table=table, mark=mark)
            rows = parquet.metadata.num_rows
            with closing(sqlite3.connect(database, isolation_level=None)) as lookup:
                for read in _fill_database(lookup, parquet, on=on, columns=new, table=table, damage=damage):
                    progress("read", read, rows)
                matched = _count_matches(opened, lookup, on=on)
                unmatched, examples = _unmatched(lookup)
                if not matched:
                    named = f" ({', '.join(examples)}{', …' if unmatched > len(examples) else ''})" * bool(examples)
                    raise RuntimeError(f"{table}: none of its {rows} values of {on}{named} is in corpus {opened.folder}")
                write_sidecar(
                    opened,
                    store=store,
                    name=name,
                    schema=schema,
                    identity={"table": file_digest(table), "on": on, "captions": captions, "mark": mark},
                    make=lambda shard: _annotate_shard(opened, shard, lookup=lookup, schema=schema, on=on, captions=captions, mark=mark),
                    merged=() if mark is None else (mark,),
                    progress=lambda done: progress("annotate", done, opened.count),
                )
        finally:
            database.unlink(missing_ok=True)
            converted.unlink(missing_ok=True)
    return Annotated(
        sidecar=name,
        rows=rows,
        samples=opened.count,
        matched=matched,
        columns=tuple(schema.names),
        unmatched=unmatched,
        unmatched_examples=examples,
        damaged=damage.rows,
        damaged_examples=tuple(damage.examples),
    )


def _default_name(table: Path) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in table.stem.lower()).strip("-")[:40] or "table"


def _new_columns(parquet: pq.ParquetFile, *, of: Corpus, table: Path, on: str, mark: str | None) -> pa.Schema:
    """The new columns of the table, in types that a sidecar can hold: numbers, booleans, texts, captions."""
    if on not in of.schema.names:
        raise ValueError(f"on {on}: corpus {of.folder} has no such column; there are: {', '.join(of.schema.names)}")
    fields = []
    for field in parquet.schema_arrow:
        if field.name == on:
            continue
        if field.name in RESERVED or field.name == mark:
            raise ValueError(f"table {table}: column '{field.name}' is reserved: rename it or leave it out")
        fields.append(pa.field(field.name, _kind(field, table=table)))
    if not fields and mark is None:
        raise ValueError(f"table {table}: has no column besides '{on}': add columns, or give mark=NAME to mark the samples that it names")
    return pa.schema(fields)


def _kind(field: pa.Field, *, table: Path) -> pa.DataType:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if field.name == TAKEDOWN and not pa.types.is_boolean(kind):
        raise ValueError(f"table {table}: column '{TAKEDOWN}' is {kind}; it must hold booleans, or use mark={TAKEDOWN}")
    if field.name == "captions":
        if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
            raise ValueError(f"table {table}: column 'captions' is {kind}; it must hold lists of texts")
        return _CAPTIONS
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    raise ValueError(f"table {table}: column '{field.name}' is {kind}; only numbers, booleans and texts can be joined: leave it out")


def _sidecar_schema(new: pa.Schema, *, of: Corpus, table: Path, mark: str | None) -> pa.Schema:
    fields = [field for field in new if field.name not in ("caption", "captions")]
    for field in fields:
        if field.name in of.schema.names and of.schema.field(field.name).type != field.type:
            old = of.schema.field(field.name).type
            raise ValueError(f"table {table}: column '{field.name}' is {field.type}, in corpus {of.folder} it is {old}: rename it")
    if mark is not None:
        fields.append(pa.field(mark, pa.bool_()))
    if len(fields) < len(new) + (mark is not None):
        fields += [pa.field("caption", pa.string()), pa.field("captions", _CAPTIONS)]
    return pa.schema(fields)


def _fill_database(
    lookup: sqlite3.Connection, parquet: pq.ParquetFile, *, on: str, columns: pa.Schema, table: Path, damage: Damage
) -> Iterator[int]:
    """Insert the rows of the table; yields the number read. Raises ValueError if two rows of one name differ."""
    lookup.execute("PRAGMA journal_mode = OFF")
    lookup.execute("PRAGMA synchronous = OFF")  # every run creates it again
    lookup.execute("CREATE TABLE rows (name TEXT PRIMARY KEY, content TEXT, is_matched INTEGER DEFAULT 0) WITHOUT ROWID")
    read = 0
    for batch in parquet.iter_batches(batch_size=_BATCH, columns=[on, *columns.names]):
        found = pa.Table.from_batches([batch])
        names = [None if name is None else str(name) for name in found.column(on).to_pylist()]
        contents = ["{}"] * len(names)
        if columns.names:
            contents = [json.dumps(row) for row in found.select(columns.names).cast(columns).to_pylist()]
        pairs = [(name, row) for name, row in zip(names, contents, strict=True) if name]
        lookup.execute("BEGIN")
        lookup.executemany("INSERT OR IGNORE INTO rows (name, content) VALUES (?, ?)", pairs)
        lookup.execute("COMMIT")
        stored = _query(lookup, [name for name, _ in pairs])
        for name, row in pairs:
            if stored[name] != row:
                raise ValueError(f"table {table}: two rows of {on} {name} differ: keep one of them")
        for row in (row for row, name in enumerate(names) if not name):
            damage.add(f"row {read + row + 1}: has no {on}")
        read += len(names)
        yield read


def _query(lookup: sqlite3.Connection, names: Sequence[str]) -> dict[str, str]:
    """name → JSON of its row, for the names in the table."""
    found: dict[str, str] = {}
    for start in range(0, len(names), _NAMES_PER_QUERY):
        part = names[start : start + _NAMES_PER_QUERY]
        found |= lookup.execute(f"SELECT name, content FROM rows WHERE name IN ({','.join('?' * len(part))})", part)
    return found


def _count_matches(corpus: Corpus, lookup: sqlite3.Connection, *, on: str) -> int:
    matched = 0
    for shard in range(len(corpus.shards)):
        names = _names(corpus, shard, on=on)
        found = _query(lookup, names)
        matched += sum(name in found for name in names)
        lookup.execute("BEGIN")
        lookup.executemany("UPDATE rows SET is_matched = 1 WHERE name = ?", [(name,) for name in found])
        lookup.execute("COMMIT")
    return matched


def _unmatched(lookup: sqlite3.Connection) -> tuple[int, tuple[str, ...]]:
    """The number of names without a sample in the corpus, and the first ones in sorted order."""
    ((count,),) = lookup.execute("SELECT count(*) FROM rows WHERE is_matched = 0")
    found = lookup.execute("SELECT name FROM rows WHERE is_matched = 0 ORDER BY name LIMIT ?", (EXAMPLES,))
    return count, tuple(name for (name,) in found)


def _names(corpus: Corpus, shard: int, *, on: str) -> list[str]:
    return ["" if name is None else str(name) for name in corpus.read(shard, columns=(on,)).column(on).to_pylist()]


def _annotate_shard(
    corpus: Corpus, shard: int, *, lookup: sqlite3.Connection, schema: pa.Schema, on: str, captions: Captions, mark: str | None
) -> pa.Table:
    names = _names(corpus, shard, on=on)
    rows = {name: json.loads(row) for name, row in _query(lookup, names).items()}
    old = corpus.read(shard, columns=[name for name in schema.names if name in corpus.schema.names])
    columns: dict[str, Any] = {}
    for field in schema:
        before = old.column(field.name).to_pylist() if field.name in old.column_names else [None] * len(names)
        if field.name == mark:
            columns[field.name] = [True if name in rows else was for name, was in zip(names, before, strict=True)]
        elif field.name not in ("caption", "captions"):
            new = [rows.get(name, {}).get(field.name) for name in names]
            columns[field.name] = [was if value is None else value for value, was in zip(new, before, strict=True)]
    if "captions" in schema.names:
        merged = [
            _merge(rows.get(name, {}), old=was or [], captions=captions)
            for name, was in zip(names, old.column("captions").to_pylist(), strict=True)
        ]
        columns |= {"caption": [texts[0] for texts in merged], "captions": merged}
    return pa.Table.from_pydict(columns, schema=schema)


def _merge(row: dict[str, Any], *, old: list[str], captions: Captions) -> list[str]:
    """Merge old and new captions: at least one, which may be ""."""
    new = [text for text in [row.get("caption"), *(row.get("captions") or [])] if text]
    if not new:
        return old or [""]
    order = {"first": [*new, *old], "last": [*old, *new], "only": new}[captions]
    return clean_captions(order)[0] or [""]
