"""`tim annotate`: columns and captions from a table, joined to a finished corpus by key, sha256 or url. Tars stay as they are.

The table may be larger than memory: its rows go into a database on disk once, from which each shard of the corpus asks for its own.
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

_BATCH = 10_000  # rows of the table that are in memory
_ASKED_AT_ONCE = 900  # SQLite takes 999 at least
_CAPTIONS = pa.list_(pa.string())


@dataclass(frozen=True, slots=True)
class Annotated:
    """Outcome: rows of the table, samples of the corpus, how many of these the table names, and the new columns.

    `unmatched`: distinct values of `on` that are none of the corpus's; `damaged`: rows that cannot be read or name nothing. Of both, the
    first ones are `examples`.
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
        corpus: what `tim prepare` or `tim index` wrote, in a folder or at a URL.
        table: its columns `caption` and `captions` are new captions, all others but `on` are taken as they are.
        on: the column of both by which rows find their samples; several samples may have the same url or sha256.
        name: of the sidecar; the table's file name unless it is given. An earlier one of this name is replaced.
        captions: whether new captions come before the old ones, after them, or in their place.
        mark: a column to set to true for every sample that the table names, such as "takedown".
        progress: called with ("read", rows, rows in all) and ("annotate", samples, samples in all).

    Samples that the table does not name keep what they had. Raises ValueError, in one line, for a table that cannot be used, and
    RuntimeError if it names no sample of the corpus; then nothing is written.
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
                for read in _fill(lookup, parquet, on=on, columns=new, table=table, damage=damage):
                    progress("read", read, rows)
                matched = _count_matches(opened, lookup, on=on)
                unmatched, examples = _unmatched(lookup)
                if not matched:
                    named = f" ({', '.join(examples)}{', …' if unmatched > len(examples) else ''})" * bool(examples)
                    raise RuntimeError(f"{table}: none of its {rows} values of {on}{named} is one of corpus {opened.folder}'s")
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
    """The table's columns that are new, in types that a sidecar can hold: numbers, truth values, texts, captions."""
    if on not in of.schema.names:
        raise ValueError(f"on {on}: corpus {of.folder} has no such column; there are: {', '.join(of.schema.names)}")
    fields = []
    for field in parquet.schema_arrow:
        if field.name == on:
            continue
        if field.name in RESERVED or field.name == mark:
            raise ValueError(f"table {table}: column '{field.name}' cannot be said anew: rename it or leave it out")
        fields.append(pa.field(field.name, _kind(field, table=table)))
    if not fields and mark is None:
        raise ValueError(f"table {table}: has nothing but '{on}': add columns, or give mark=NAME to mark the samples that it names")
    return pa.schema(fields)


def _kind(field: pa.Field, *, table: Path) -> pa.DataType:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if field.name == TAKEDOWN and not pa.types.is_boolean(kind):
        raise ValueError(f"table {table}: column '{TAKEDOWN}' is {kind}; it must hold truth values, or use mark={TAKEDOWN}")
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
    raise ValueError(f"table {table}: column '{field.name}' is {kind}; numbers, truth values and texts can be joined: leave it out")


def _sidecar_schema(new: pa.Schema, *, of: Corpus, table: Path, mark: str | None) -> pa.Schema:
    fields = [field for field in new if field.name not in ("caption", "captions")]
    for field in fields:
        if field.name in of.schema.names and of.schema.field(field.name).type != field.type:
            old = of.schema.field(field.name).type
            raise ValueError(f"table {table}: column '{field.name}' is {field.type}, corpus {of.folder} has one of {old}: rename it")
    if mark is not None:
        fields.append(pa.field(mark, pa.bool_()))
    if len(fields) < len(new) + (mark is not None):
        fields += [pa.field("caption", pa.string()), pa.field("captions", _CAPTIONS)]
    return pa.schema(fields)


def _fill(
    lookup: sqlite3.Connection, parquet: pq.ParquetFile, *, on: str, columns: pa.Schema, table: Path, damage: Damage
) -> Iterator[int]:
    """Put the table's rows into the database, and say how many were read. Raises ValueError if two rows of one name differ."""
    lookup.execute("PRAGMA journal_mode = OFF")
    lookup.execute("PRAGMA synchronous = OFF")  # it is made anew by every run
    lookup.execute("CREATE TABLE rows (name TEXT PRIMARY KEY, said TEXT, is_matched INTEGER DEFAULT 0) WITHOUT ROWID")
    read = 0
    for batch in parquet.iter_batches(batch_size=_BATCH, columns=[on, *columns.names]):
        found = pa.Table.from_batches([batch])
        names = [None if name is None else str(name) for name in found.column(on).to_pylist()]
        said = [json.dumps(row) for row in found.select(columns.names).cast(columns).to_pylist()] if columns.names else ["{}"] * len(names)
        pairs = [(name, row) for name, row in zip(names, said, strict=True) if name]
        lookup.execute("BEGIN")
        lookup.executemany("INSERT OR IGNORE INTO rows (name, said) VALUES (?, ?)", pairs)
        lookup.execute("COMMIT")
        stored = _ask(lookup, [name for name, _ in pairs])
        for name, row in pairs:
            if stored[name] != row:
                raise ValueError(f"table {table}: two rows of {on} {name} say different things: keep one of them")
        for row in (row for row, name in enumerate(names) if not name):
            damage.add(f"row {read + row + 1}: has no {on}")
        read += len(names)
        yield read


def _ask(lookup: sqlite3.Connection, names: Sequence[str]) -> dict[str, str]:
    """What the table says of those names that it has."""
    found: dict[str, str] = {}
    for start in range(0, len(names), _ASKED_AT_ONCE):
        part = names[start : start + _ASKED_AT_ONCE]
        found |= lookup.execute(f"SELECT name, said FROM rows WHERE name IN ({','.join('?' * len(part))})", part)
    return found


def _count_matches(corpus: Corpus, lookup: sqlite3.Connection, *, on: str) -> int:
    matched = 0
    for shard in range(len(corpus.shards)):
        names = _names(corpus, shard, on=on)
        found = _ask(lookup, names)
        matched += sum(name in found for name in names)
        lookup.execute("BEGIN")
        lookup.executemany("UPDATE rows SET is_matched = 1 WHERE name = ?", [(name,) for name in found])
        lookup.execute("COMMIT")
    return matched


def _unmatched(lookup: sqlite3.Connection) -> tuple[int, tuple[str, ...]]:
    """How many names are none of the corpus's, and the first ones in order."""
    ((count,),) = lookup.execute("SELECT count(*) FROM rows WHERE is_matched = 0")
    found = lookup.execute("SELECT name FROM rows WHERE is_matched = 0 ORDER BY name LIMIT ?", (EXAMPLES,))
    return count, tuple(name for (name,) in found)


def _names(corpus: Corpus, shard: int, *, on: str) -> list[str]:
    return ["" if name is None else str(name) for name in corpus.read(shard, columns=(on,)).column(on).to_pylist()]


def _annotate_shard(
    corpus: Corpus, shard: int, *, lookup: sqlite3.Connection, schema: pa.Schema, on: str, captions: Captions, mark: str | None
) -> pa.Table:
    names = _names(corpus, shard, on=on)
    said = {name: json.loads(row) for name, row in _ask(lookup, names).items()}
    old = corpus.read(shard, columns=[name for name in schema.names if name in corpus.schema.names])
    columns: dict[str, Any] = {}
    for field in schema:
        before = old.column(field.name).to_pylist() if field.name in old.column_names else [None] * len(names)
        if field.name == mark:
            columns[field.name] = [True if name in said else was for name, was in zip(names, before, strict=True)]
        elif field.name not in ("caption", "captions"):
            new = [said.get(name, {}).get(field.name) for name in names]
            columns[field.name] = [was if value is None else value for value, was in zip(new, before, strict=True)]
    if "captions" in schema.names:
        merged = [
            _merge(said.get(name, {}), old=was or [], captions=captions)
            for name, was in zip(names, old.column("captions").to_pylist(), strict=True)
        ]
        columns |= {"caption": [texts[0] for texts in merged], "captions": merged}
    return pa.Table.from_pydict(columns, schema=schema)


def _merge(said: dict[str, Any], *, old: list[str], captions: Captions) -> list[str]:
    """At least one caption, which may be ""."""
    new = [text for text in [said.get("caption"), *(said.get("captions") or [])] if text]
    if not new:
        return old or [""]
    order = {"first": [*new, *old], "last": [*old, *new], "only": new}[captions]
    return clean_captions(order)[0] or [""]
