"""Text labels as classes, and hints on unusable captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from dataprep.sources.tabular.tables import Table
from pipeline.corpus.record_fields import CLASS_NAME, ColumnMapping, Fields, Value, as_label, values_at

_PEEK = 1000  # rows read to find out whether labels are texts
_MAX_CLASSES = 100_000


def text_labels(tables: Sequence[Table], *, columns: ColumnMapping) -> set[str]:
    """All values of the label column if one of the first thousand rows of a table has a text that is not a number; else none.

    Raises ValueError for too many of them.
    """
    found: set[str] = set()
    for table in tables:
        if not _has_texts(table, columns=columns):
            continue
        for _, record in table.rows(only=columns.labels):
            found.add(_text(record, columns))
            if len(found) > _MAX_CLASSES:
                raise ValueError(f"{table.file}: more than {_MAX_CLASSES} classes in {columns.labels[0]}; name another columns.label")
    return found - {""}


def class_numbers(names: set[str]) -> dict[str, int]:
    """Name → class, in sorted order."""
    return {name: number for number, name in enumerate(sorted(names))}


def describe_classes(classes: Mapping[str, int]) -> str:
    """One sentence with the order of classes."""
    named = [f"{name} is {number}" for name, number in classes.items()]
    shown = named if len(named) <= 10 else [*named[:9], "…", named[-1]]
    return f"{len(named)} text labels are classes in sorted order: {', '.join(shown)}"


def with_class(fields: Fields, *, record: Mapping[str, Value], columns: ColumnMapping, classes: Mapping[str, int]) -> Fields:
    """The fields with the class of the row's label. A number counts as a name if other labels are texts."""
    name = _text(record, columns) if classes else ""
    if name not in classes:
        return fields
    return Fields(captions=fields.captions, label=classes[name], extra={**fields.extra, CLASS_NAME: name})


def no_caption_hint(record: Mapping[str, Value], *, columns: ColumnMapping, classes: Mapping[str, int]) -> str:
    """Why a row has neither a caption nor a class although these columns have values; "" if unknown."""
    for column in columns.captions:
        value = next(values_at(record, column), None)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and first:
            part = f"{column}.0" if isinstance(value, list) else column
            examples = " or ".join(f"{part}.{name}" for name in list(first)[:3])
            return f"{column} holds objects, not texts: name a part of it, such as columns.caption={examples}"
        if value is not None and not isinstance(value, (str, list)):
            return f"{column} holds {value!r:.40}, not a text"
    name = _text(record, columns)
    return f"{name} is not one of the corpus's classes" if classes and name and name not in classes else ""


def _has_texts(table: Table, *, columns: ColumnMapping) -> bool:
    names = (_text(record, columns) for _, record in islice(table.rows(only=columns.labels), _PEEK)) if columns.labels else ()
    return any(name and as_label(name) is None for name in names)


def _text(record: Mapping[str, Value] | str, columns: ColumnMapping) -> str:
    """The first label of a row as text, "" if missing."""
    if isinstance(record, str):
        return ""
    values = (next(values_at(record, label), None) for label in columns.labels)
    found = next((value for value in values if isinstance(value, (str, int)) and not isinstance(value, bool)), "")
    return str(found).strip()
