"""What a row of metadata or a JSON file beside a picture says about it, and which files of a sample say something."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
    """What a metadata row or a JSON member says about a picture, sorted by what it is good for."""

    captions: tuple[str, ...]
    label: int | None
    extra: dict[str, Value]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a record say what: captions in order of preference; the class, of which the first usable one counts; the picture."""

    captions: tuple[str, ...] = ("text", "caption", "captions")
    labels: tuple[str, ...] = ("label", "class")
    image: str = "file_name"


STANDARD = Columns()
# Columns that state what preparation finds out by itself: a source's own values would only contradict it.
RECOMPUTED = {"file_name", "key", "status", "error_message", "width", "height", "original_width", "original_height", "sha256"}
_LEAST, _GREATEST = -(2**63), 2**63 - 1
# Columns that our tables use in another sense: the source's are kept under `source_NAME`.
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
} | {f"{member}_{what}" for member in ("image", "text", "cls", "json") for what in ("offset", "length")}


def read_fields(record: Mapping[str, Value], *, columns: Columns = STANDARD) -> Fields:
    """Captions and an integer class from the columns that hold them; all further columns as they are."""
    captions: list[str] = []
    for name in columns.captions:
        value = record.get(name)
        if isinstance(value, str):
            captions.append(value)
        elif isinstance(value, list):
            captions += [one for one in value if isinstance(one, str)]
    label, label_name = None, ""
    for name in columns.labels:
        label, label_name = _as_label(record.get(name)), name
        if label is not None:
            break
    consumed = {*columns.captions, columns.image, *([] if label is None else [label_name])}
    extra = {
        f"source_{name}" if name in TAKEN else name: _storable(value)
        for name, value in record.items()
        if name and name not in RECOMPUTED and name not in consumed
    }
    return Fields(captions=tuple(captions), label=label, extra=extra)


def _storable(value: Value) -> Value:
    """Numbers that no table or JSON file can hold: not finite → missing, beyond 64 bits → text."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not _LEAST <= value <= _GREATEST:
        return str(value)
    return value


def _as_label(value: Value) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value[:20])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        return None
    return value


def parse_json(payload: bytes) -> dict[str, Value] | None:
    """The object in a JSON file, None if it holds none."""
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
