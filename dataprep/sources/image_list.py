"""Lists of images as sources: tables with a column of paths, URLs or embedded images, one input per row.

Relative paths start from the list's folder. A list on this machine is trusted: it may name any file and any URL. A remote list may name
URLs and files below its own folder only, not files of this machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataprep.sources.class_labels import no_caption_hint, text_labels, with_class
from dataprep.sources.column_mapping import ColumnConfig, choose, describe, with_file_name
from dataprep.sources.files.paths import join
from dataprep.sources.raw_sample import RawSample
from dataprep.sources.tabular.inline_images import embedded_image
from dataprep.sources.tabular.tables import Table, plain
from pipeline.corpus.record_fields import IMAGE_EXTENSIONS, ColumnMapping, Fields, read_fields, values_at
from pipeline.corpus.text_decoding import decode_text
from pipeline.storage.remote import is_remote

_IMAGE_FOLDERS = ("images", "Images", "image", "imgs", "img")
_NETWORK = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")


class ImageList:
    """Tables with the same columns, read in the given order.

    Adjacent rows that name the same file with other captions form one input (Flickr8k has five rows for the five captions of an image).
    """

    layout = "list"
    tags: tuple[str, ...] = ()

    def __init__(
        self, files: Sequence[str], *, name: str, columns: ColumnConfig, root: Path | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._folder_notes = tuple(notes)
        self.root = root
        self.tables = [Table(file, encoding=columns.encoding or "") for file in files]
        filled = next((table for table in self.tables if table.names), None)
        if filled is None:
            raise ValueError(f"{self.tables[0].file}: has no readable rows ({self.tables[0].problem or 'it is empty'})")
        self.columns = choose(columns, names=filled.names, images=filled.images, origin=filled.file)
        self.classes: Mapping[str, int] = {}
        self._joined = 0

    def reads(self) -> str:
        """One sentence on what is read, and from which columns."""
        files = self.tables[0].name if len(self.tables) == 1 else f"{len(self.tables)} tables"
        return f"{self.name}: {files}, {describe(self.columns)}"

    def expected(self) -> int | None:
        """Number of inputs, None if it is unknown before they are read."""
        counts = [table.count for table in self.tables]
        return None if None in counts else sum(count or 0 for count in counts)

    def digest(self) -> str:
        """Digest of the tables, without the images that they name."""
        listing = "".join(f"{table.name}\0{table.digest()}\n" for table in self.tables)
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def class_names(self) -> set[str]:
        """The text labels of the label column."""
        return text_labels(self.tables, columns=self.columns)

    def samples(self) -> Iterator[RawSample]:
        """All rows of all tables."""
        self._joined = 0
        held: RawSample | None = None
        for sample in self._rows():
            joined = _join(held, sample) if held else None
            self._joined += joined is not None
            if held and joined is None:
                yield held
            held = joined or sample
        if held:
            yield held

    def notes(self) -> list[str]:
        """One sentence per group of rows and files that are not separate inputs. Complete once `samples()` is exhausted."""
        joined = [f"{self._joined} row(s) are further captions of the image in the row before"] if self._joined else []
        return [f"{self.name}: {note}" for note in (*joined, *self._folder_notes)]

    def _rows(self) -> Iterator[RawSample]:
        for table in self.tables:
            folder = table.file.rpartition("/")[0] or "."
            for number, record in table.rows():
                where = f"{table.name}:{number}"
                yield sample_of(record, source=self.name, columns=self.columns, where=where, folder=folder, classes=self.classes)


def _join(held: RawSample, sample: RawSample) -> RawSample | None:
    """Both rows as one input if the second has further captions for the file of the first, else None."""
    is_same = held.file == sample.file and bool(held.file) and held.label == sample.label and not (held.reason or sample.reason)
    if not is_same or not held.captions or set(sample.captions) <= set(held.captions):
        return None
    return replace(held, captions=held.captions + sample.captions)


def sample_of(
    record: Mapping[str, Any] | str,
    *,
    source: str,
    columns: ColumnMapping,
    where: str,
    folder: str | None,
    classes: Mapping[str, int] | None = None,
) -> RawSample:
    """A row of a table → an input.

    Args:
        record: the row, or its problem.
        where: name of the row in the source.
        folder: path or URL from which relative paths start; None if a row may name URLs only.
        classes: text label → class.
    """
    if isinstance(record, str):
        return RawSample(source=source, path=where, reason="bad-record", detail=record)
    value = next(values_at(record, columns.image), None)
    named = ""
    if isinstance(value, Mapping):  # as written by the datasets library
        named = value.get("path") or ""
        value = value.get("bytes") or named
    try:
        record = _with_texts(record, columns=columns)
        if isinstance(value, str):
            value = embedded_image(value) or value
    except ValueError as error:
        return RawSample(source=source, path=where, reason="bad-record", detail=f"{where}: {error}")
    rest = {name: plain(item) for name, item in record.items() if name != columns.image and not isinstance(item, bytes)}
    stated = value if isinstance(value, str) else named if isinstance(named, str) else ""
    fields = read_fields(with_file_name(rest, columns=columns, name=stated), columns=columns)
    fields = with_class(fields, record=rest, columns=columns, classes=classes or {})
    hint = "" if fields.captions else no_caption_hint(rest, columns=columns, classes=classes or {})
    if isinstance(value, (bytes, bytearray)):
        if named and f"{columns.image}_path" not in rest:
            fields.extra[f"{columns.image}_path"] = str(named)
        return _sample(source, where, fields=fields, data=bytes(value), detail=hint)
    if value is None or value == "":
        return _sample(source, where, fields=fields, reason="missing", detail=f"{where} has nothing in {columns.image}")
    if not isinstance(value, str) or "\0" in value:
        return _sample(source, where, fields=fields, reason="bad-record", detail=f"{where} has no path in {columns.image}")
    file = _resolve(value, folder=folder)
    if file is None:
        detail = f"{where} names a file outside of where it comes from: {value}"
        return _sample(source, where, fields=fields, reason="bad-record", detail=detail)
    if is_remote(value):
        fields.extra.setdefault("url", value)
    return _sample(source, value, fields=fields, file=file, detail=hint)


def _with_texts(record: Mapping[str, Any], *, columns: ColumnMapping) -> Mapping[str, Any]:
    """The row with decoded captions and labels, which may be stored as bytes. Raises UndecodableText."""
    texts = {name: record[name] for name in (*columns.captions, *columns.labels) if isinstance(record.get(name), bytes)}
    return {**record, **{name: decode_text(text, encoding=columns.encoding) for name, text in texts.items()}} if texts else record


def _resolve(name: str, *, folder: str | None) -> str | None:
    """The path or URL that a row names, None if it is not allowed."""
    if folder is not None and not is_remote(folder):
        return name if is_remote(name) else _local_file(name, folder=folder)
    if is_remote(name):
        *inner, outer = name.split("::")  # zip://a.jpg::https://x/y.zip: a member of an archive
        is_allowed = outer.partition("://")[0].lower() in _NETWORK and all(part.startswith("zip://") for part in inner)
        return name if is_allowed else None
    if folder is None or name.startswith("/") or ".." in name.split("/"):
        return None
    return join(folder, name)


def _local_file(name: str, *, folder: str) -> str:
    """The file for a name in a list on this machine: below the list's folder, or in the other usual locations.

    These are a folder `Images` or similar beside the list (Flickr8k), and the parent folder if the name begins with the list's folder
    (kohya's scripts). A name may lack the image's extension.
    """
    file = os.path.join(folder, name)
    if os.path.isabs(name) or os.path.exists(file):
        return file
    own = f"{os.path.basename(os.path.abspath(folder))}/"
    inner = os.path.join(folder, name.removeprefix(own)) if name.startswith(own) else file
    stems = [inner, *(os.path.join(folder, images, name) for images in _IMAGE_FOLDERS)]
    endings = [""] if os.path.splitext(name)[1] else ["", *(f".{extension}" for extension in IMAGE_EXTENSIONS)]
    candidates = (f"{stem}{ending}" for stem in stems for ending in endings)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), file)


def _sample(
    source: str, path: str, *, fields: Fields, file: str = "", data: bytes | None = None, reason: str = "", detail: str = ""
) -> RawSample:
    return RawSample(
        source=source,
        path=path,
        file=file,
        data=data,
        captions=fields.captions,
        label=fields.label,
        extra=fields.extra,
        reason=reason,
        detail=detail,
    )
