"""Fields of metadata rows and JSON files of images, and the image extensions."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

Value = str | int | float | bool | list | dict | None

IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "heic",
    "heif",
    "jp2",
    "jxl",
    "ppm",
    "pgm",
)


@dataclass(frozen=True, slots=True)
class Fields:
    """Content of a metadata row or a JSON member of an image, by use."""

    captions: tuple[str, ...]
    label: int | None
    extra: dict[str, Value]


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """Columns of a record: captions in order of preference; classes, of which the first usable one is taken; the image.

    A dotted name is a part of a nested column: `conversations.0.value`, or `conversations.value` for all elements of the list.
    `encoding`: for texts without a byte order mark, UTF-8 if empty.
    """

    captions: tuple[str, ...] = ("text", "caption", "captions")
    labels: tuple[str, ...] = ("label", "class")
    image: str = "file_name"
    encoding: str = ""


STANDARD = ColumnMapping()
CLASS_NAME = "class_name"  # extra column with the name of a sample's class
# Columns that preparation computes itself: a source's values are ignored.
RECOMPUTED = {"file_name", "key", "status", "error_message", "width", "height", "original_width", "original_height", "sha256"}
_LEAST, _GREATEST = -(2**63), 2**63 - 1
# Columns with another meaning in our tables: the source's are kept as `source_NAME`.
TAKEN = {
    "source",
    "source_tags",
    "path",
    "caption",
    "captions",
    "reason",
    "detail",
    "duplicate_of",
    "near_duplicate_of",
    "phash",
    "label",
    "thumbnail",
    "mask_path",
} | {f"{member}_{what}" for member in ("image", "text", "cls", "json", "mask") for what in ("offset", "length")}


def read_fields(record: Mapping[str, Value], *, columns: ColumnMapping = STANDARD) -> Fields:
    """Captions and an integer class from their columns; all other columns unchanged."""
    captions: list[str] = []
    for name in columns.captions:
        for value in values_at(record, name):
            captions += _as_captions(value)
    label, label_name = None, ""
    for name in columns.labels:
        label, label_name = as_label(next(values_at(record, name), None)), name
        if label is not None:
            break
    consumed = {*columns.captions, columns.image, *([] if label is None else [label_name])}
    extra = {
        f"source_{name}" if name in TAKEN else name: _storable(value)
        for name, value in record.items()
        if name and name not in RECOMPUTED and name not in consumed
    }
    return Fields(captions=tuple(captions), label=label, extra=extra)


def values_at(record: Mapping[str, Value], name: str) -> Iterator[Value]:
    """The values of a column, or of the parts of a nested column with a dotted name. Missing values are omitted."""
    if name in record:
        yield record[name]
        return
    root = next((root for root in _roots(name) if root in record), None)
    if root is not None:
        yield from _parts(record[root], name[len(root) + 1 :].split("."))


def names_column(name: str, *, among: Collection[str]) -> bool:
    """Whether a name is a column, or a dotted name of a part of one."""
    return name in among or any(root in among for root in _roots(name))


def _roots(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))


def _parts(value: Value, path: list[str]) -> Iterator[Value]:
    if not path:
        yield value
    elif isinstance(value, dict):
        if path[0] in value:
            yield from _parts(value[path[0]], path[1:])
    elif isinstance(value, list) and path[0].isdecimal():
        if int(path[0]) < len(value):
            yield from _parts(value[int(path[0])], path[1:])
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item, path)


def _as_captions(value: Value) -> list[str]:
    """Captions from a text, a list of texts, or a text with such a list in JSON or Python syntax."""
    if isinstance(value, list):
        return [one for one in value if isinstance(one, str)]
    if not isinstance(value, str):
        return []
    text = value.strip()
    if text.startswith(('["', "['", "[ ")) and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(parsed, list) and parsed and all(isinstance(one, str) for one in parsed):
                return parsed
    return [value]


def _storable(value: Value) -> Value:
    """Replace numbers that tables and JSON files cannot store: not finite → missing, beyond 64 bits → text."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not _LEAST <= value <= _GREATEST:
        return str(value)
    return value


def as_label(value: Value) -> int | None:
    """A class id, 0 or greater, or None for any other value."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps, as pandas writes it
        value = int(value)
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value[:20])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        return None
    return value
