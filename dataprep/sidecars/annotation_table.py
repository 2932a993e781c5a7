"""The table of `tim annotate` as a Parquet file. CSV, TSV and JSON lines are converted; the types of their columns are inferred.

A column of a text table holds integers, numbers or booleans if all its values do. An empty field of a CSV is a missing value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.sources.tabular.tables import COLUMNAR, Table, kind_of, plain
from pipeline.corpus.sidecars import TAKEDOWN
from pipeline.errors import one_line

EXAMPLES = 3  # of unusable rows and values
_BATCH = 10_000  # rows in memory
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})", re.ASCII)  # 007 is text
_DECIMAL = re.compile(r"[+-]?((\d+\.\d*|\.\d+)([eE][+-]?\d+)?|\d+[eE][+-]?\d+)", re.ASCII)
_TRUTH = {"true": True, "false": False}
_MARKS = _TRUTH | {"1": True, "0": False, "yes": True, "no": False}
_TEXT, _WHOLE_NUMBER, _NUMBER, _TRUTH_VALUE = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_TEXTS = pa.list_(pa.string())


@dataclass(slots=True)
class Damage:
    """Number of unreadable rows, and the problems of the first ones."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(problem)


def as_parquet(table: Path, *, on: str, known: pa.Schema, into: Path) -> tuple[pq.ParquetFile, Damage]:
    """Open a table; a text table is converted into the file `into`. In a CSV, the column `on` and columns that are texts in the `known`
    schema stay texts.

    Raises ValueError if the table cannot be read, lacks the column `on`, or has a column that a sidecar cannot hold.
    """
    kind = kind_of(str(table))
    damage = Damage()
    if kind is None or kind == "parquet":
        try:
            parquet = pq.ParquetFile(table)
        except (OSError, pa.ArrowException) as error:
            wanted = "give a .parquet, .csv, .tsv or .jsonl file"
            raise ValueError(f"table {table}: cannot be read as parquet: {one_line(error)}; {wanted}") from error
    else:
        parquet = _convert(table, kind=kind, texts={on, *_texts_of(known)}, into=into, damage=damage)
    names = parquet.schema_arrow.names
    if on not in names:
        raise ValueError(f"table {table}: has no column '{on}' to join on; there are: {', '.join(names)}")
    return parquet, damage


def _convert(table: Path, *, kind: str, texts: Collection[str], into: Path, damage: Damage) -> pq.ParquetFile:
    try:
        source = Table(str(table))
    except OSError as error:
        raise ValueError(f"table {table}: cannot be read: {one_line(error)}") from error
    if not source.names:
        raise ValueError(f"table {table}: has no readable rows ({source.problem or 'it is empty'})")
    is_text = kind not in COLUMNAR and not kind.startswith(("json", "ndjson"))
    names = dict.fromkeys(source.names)
    kinds: dict[str, set[pa.DataType]] = {}
    for record in _records(source, damage=damage):
        names |= dict.fromkeys(record)
        for name, value in record.items():
            if (found := _kind(value, name=name, is_text=is_text and name not in texts)) is not None:
                kinds.setdefault(name, set()).add(found)
    schema = pa.schema([(name, _common(kinds.get(name, set()), name=name, table=table)) for name in names])
    with pq.ParquetWriter(into, schema) as writer:
        rows: list[dict[str, Any]] = []
        for record in _records(source, damage=Damage()):
            rows.append({each.name: _typed(record.get(each.name), kind=each.type, name=each.name) for each in schema})
            if len(rows) == _BATCH:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return pq.ParquetFile(into)


def _texts_of(schema: pa.Schema) -> list[str]:
    return [each.name for each in schema if each.type == _TEXT]


def _records(source: Table, *, damage: Damage) -> Iterator[dict[str, Any]]:
    for number, record in source.rows():
        if isinstance(record, str):
            damage.add(f"{source.name}:{number}: {record}")
        else:
            yield {str(name): plain(value) for name, value in record.items() if name}


def _kind(value: Any, *, name: str, is_text: bool) -> pa.DataType | None:
    """The narrowest type of a value, None if it is missing."""
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return _TRUTH_VALUE
    if isinstance(value, (int, float)):
        return _WHOLE_NUMBER if isinstance(value, int) and abs(value) < 2**63 else _NUMBER
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return _TEXTS
    if not isinstance(value, str):
        return pa.null()
    if not is_text or name == "caption":
        return _TEXT
    text = value.strip()
    if name == "captions":
        return _TEXT if _texts(text) is None else _TEXTS
    if text.lower() in (_MARKS if name == TAKEDOWN else _TRUTH):
        return _TRUTH_VALUE
    return _WHOLE_NUMBER if _WHOLE.fullmatch(text) else _NUMBER if _DECIMAL.fullmatch(text) else _TEXT


def _common(kinds: set[pa.DataType], *, name: str, table: Path) -> pa.DataType:
    """The common type of a column with values of these types. Raises ValueError if there is none."""
    if not kinds:
        return _TEXTS if name == "captions" else _TEXT
    if pa.null() in kinds or (_TEXTS in kinds and len(kinds) > 1):
        raise ValueError(f"table {table}: column '{name}' holds objects or values of several kinds: leave it out, or write texts")
    if len(kinds) == 1:
        return next(iter(kinds))
    return _NUMBER if kinds == {_WHOLE_NUMBER, _NUMBER} else _TEXT


def _typed(value: Any, *, kind: pa.DataType, name: str) -> Any:
    """A value in the type of its column."""
    if value is None or value == "":
        return None
    if kind == _TEXT:
        return value if isinstance(value, str) else json.dumps(value)
    if not isinstance(value, str):
        return float(value) if kind == _NUMBER else value
    text = value.strip()
    if kind == _TEXTS:
        return _texts(text)
    if kind == _TRUTH_VALUE:
        return (_MARKS if name == TAKEDOWN else _TRUTH)[text.lower()]
    return int(text) if kind == _WHOLE_NUMBER else float(text)


def _texts(text: str) -> list[str] | None:
    """A JSON list of texts, None for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None
