"""Map the columns of a source to images, captions and classes, by the config or else by their names and types."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.corpus.record_fields import IMAGE_EXTENSIONS, STANDARD, ColumnMapping, names_column
from pipeline.corpus.text_decoding import check_encoding

_PATHS = ("file_name", "image", "image_path", "img_path", "path", "filepath", "file_path", "filename", "file", "img", *IMAGE_EXTENSIONS)
_URLS = ("url", "image_url", "img_url", "image_link", "link", "contenturl")
_CAPTIONS = ("txt", "prompt", "alt_text", "alt", "description", "top_caption", "title")
_LABELS = (*STANDARD.labels, "cls", "labels")
FILE_NAME = "filename"  # as a caption column: the name of the image file
Column = Field(default=None, min_length=1)


class ColumnConfig(BaseModel):
    """Names of columns. Missing ones are guessed, and the guess is reported.

    `image`: bytes, a path or a URL. `caption`: one column, or several in order of preference; a column may hold lists; `filename` is the
    name of the image file without its extension, with spaces for underscores and dashes. `label`: an integer class, or text, whose
    values become classes in sorted order. A dotted name is a part of a nested column: `conversations.0.value`, or `conversations.value`
    for all elements of a list. `folders`: use the name of an image's folder as its class (default: only if no image has other text).
    `encoding`: of texts that are not UTF-8 and have no byte order mark. `masks`: a folder with the loss masks of an image folder, each with
    the relative path of its image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str | None = Column
    caption: str | tuple[str, ...] | None = Column
    label: str | None = Column
    folders: bool | None = None
    encoding: str | None = Column
    masks: str | None = Column

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        return encoding if encoding is None else check_encoding(encoding)

    @property
    def captions(self) -> tuple[str, ...] | None:
        return (self.caption,) if isinstance(self.caption, str) else self.caption


def choose(
    config: ColumnConfig, *, names: Sequence[str], images: Collection[str] = (), origin: str, defaults: ColumnMapping | None = None
) -> ColumnMapping:
    """Choose the columns to read.

    Args:
        names: all columns of the source.
        images: columns that hold image bytes, by their type.
        origin: name of the source in errors.
        defaults: the convention of the source's format.

    Raises ValueError, with the available columns, for a column that is missing or cannot be guessed.
    """
    for asked in (config.image, config.label, *(config.captions or ())):
        if asked is not None and not names_column(asked, among=names) and (asked != FILE_NAME or asked in (config.image, config.label)):
            raise ValueError(f"{origin}: has no column {asked}; there are {_listed(names)}")
    image = config.image or _first((*_PATHS, *_URLS), among=images) or next(iter(images), None) or _first((*_PATHS, *_URLS), among=names)
    if image is None and defaults is not None:
        image = defaults.image
    if image is None:
        raise ValueError(f"{origin}: which column holds images, their paths or URLs? Set columns.image=NAME; there are {_listed(names)}")
    others = [name for name in names if name != image]
    captions = config.captions or _standard(others) or _one(_first(_CAPTIONS, among=others))
    labels = _one(config.label) or tuple(name for label in _LABELS for name in others if name.lower() == label)
    return ColumnMapping(captions=captions, labels=labels, image=image, encoding=config.encoding or "")


def of_json(config: ColumnConfig) -> ColumnMapping:
    """Columns to read from JSON files beside images: those of the config, or else the usual ones."""
    return ColumnMapping(
        captions=config.captions or STANDARD.captions, labels=_one(config.label) or STANDARD.labels, encoding=config.encoding or ""
    )


def with_file_name(record: Mapping[str, Any], *, columns: ColumnMapping, name: str) -> Mapping[str, Any]:
    """The record, with a caption from the name of the image's file where that is asked for: "a/red_fox-2.jpg" → "red fox 2"."""
    if FILE_NAME not in columns.captions or not name:
        return record
    base = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    stem, dot, extension = base.rpartition(".")
    base = stem if dot and extension.lower() in IMAGE_EXTENSIONS else base
    return {**record, FILE_NAME: " ".join(base.replace("_", " ").replace("-", " ").split())}


def describe(columns: ColumnMapping) -> str:
    """Phrase on what is read from which column."""
    parts = [f"images from {columns.image}", f"captions from {', '.join(columns.captions) or 'nowhere'}"]
    return ", ".join([*parts, *(f"classes from {label}" for label in columns.labels[:1])]) + describe_encoding(columns)


def describe_encoding(columns: ColumnMapping) -> str:
    """Phrase on the encoding of texts, "" for the default."""
    return f", decoded as {columns.encoding}" if columns.encoding else ""


def _standard(names: Sequence[str]) -> tuple[str, ...]:
    """The usual caption columns, in the usual order, in any case."""
    return tuple(name for standard in STANDARD.captions for name in names if name.lower() == standard)


def _first(wanted: Sequence[str], *, among: Collection[str]) -> str | None:
    """The first wanted name that exists, in any case."""
    return next((name for want in wanted for name in among if name.lower() == want), None)


def _one(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (" …" if len(names) > 20 else "") if names else "none"
