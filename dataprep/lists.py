"""Lists of pictures as sources: tables with a column of paths, URLs or the pictures themselves, one input a row.

A relative path starts from the list's folder. A list on this machine is its owner's word: it may name any file and any URL. One that
comes from elsewhere may not reach for files of this machine: it names URLs, and files below its own folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataprep.columns import ColumnConfig, choose, describe, with_file_name
from dataprep.places import join
from dataprep.records import RawSample
from dataprep.tables import Table, plain
from pipeline.fields import Columns, Fields, read_fields
from pipeline.remote import is_remote

_NETWORK = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")


class ImageList:
    """Tables of the same columns, read one after the other in the given order."""

    layout = "list"
    tags: tuple[str, ...] = ()

    def __init__(
        self, files: Sequence[str], *, name: str, columns: ColumnConfig, root: Path | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._folder_notes = tuple(notes)
        self.root = root
        self.tables = [Table(file) for file in files]
        filled = next((table for table in self.tables if table.names), None)
        if filled is None:
            raise ValueError(f"{self.tables[0].file}: has no rows that can be read ({self.tables[0].problem or 'it is empty'})")
        self.columns = choose(columns, names=filled.names, pictures=filled.pictures, place=filled.file)

    def reads(self) -> str:
        """What is read, and from which columns, in a sentence."""
        files = self.tables[0].name if len(self.tables) == 1 else f"{len(self.tables)} tables"
        return f"{self.name}: {files}, {describe(self.columns)}"

    def expected(self) -> int | None:
        """How many inputs there are, where that is known without reading them."""
        counts = [table.count for table in self.tables]
        return None if None in counts else sum(count or 0 for count in counts)

    def digest(self) -> str:
        """The tables' own digests. The pictures that they name are not looked at."""
        listing = "".join(f"{table.name}\0{table.digest()}\n" for table in self.tables)
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All rows of all tables."""
        for table in self.tables:
            folder = table.file.rpartition("/")[0] or "."
            for number, record in table.rows():
                yield sample_of(record, source=self.name, columns=self.columns, where=f"{table.name}:{number}", folder=folder)

    def notes(self) -> list[str]:
        """What lies in the folder of the tables and is not read, in sentences."""
        return [f"{self.name}: {note}" for note in self._folder_notes]


def sample_of(record: Mapping[str, Any] | str, *, source: str, columns: Columns, where: str, folder: str | None) -> RawSample:
    """A row of a table → an input.

    Args:
        record: the row, or what is wrong with it.
        where: what the source calls the row.
        folder: path or URL that relative paths start from; None where a row may name nothing but URLs.
    """
    if isinstance(record, str):
        return RawSample(source=source, path=where, reason="bad-record", detail=record)
    value = record.get(columns.image)
    named = ""
    if isinstance(value, Mapping):  # as the datasets library writes images
        named = value.get("path") or ""
        value = value.get("bytes") or named
    rest = {name: plain(item) for name, item in record.items() if name != columns.image and not isinstance(item, bytes)}
    stated = value if isinstance(value, str) else named if isinstance(named, str) else ""
    fields = read_fields(with_file_name(rest, columns=columns, name=stated), columns=columns)
    if isinstance(value, (bytes, bytearray)):
        if named and f"{columns.image}_path" not in rest:
            fields.extra[f"{columns.image}_path"] = str(named)
        return _sample(source, where, fields=fields, data=bytes(value))
    if value is None or value == "":
        return _sample(source, where, fields=fields, reason="missing", detail=f"{where} has nothing in {columns.image}")
    if not isinstance(value, str) or "\0" in value:
        return _sample(source, where, fields=fields, reason="bad-record", detail=f"{where} has no path in {columns.image}")
    file = _place(value, folder=folder)
    if file is None:
        detail = f"{where} names a file outside of where it comes from: {value}"
        return _sample(source, where, fields=fields, reason="bad-record", detail=detail)
    if is_remote(value):
        fields.extra.setdefault("url", value)
    return _sample(source, value, fields=fields, file=file)


def _place(name: str, *, folder: str | None) -> str | None:
    """The path or URL that a row means, None for one that it may not name."""
    if folder is not None and not is_remote(folder):
        return name if is_remote(name) else os.path.join(folder, name)
    if is_remote(name):
        *inner, outer = name.split("::")  # zip://a.jpg::https://x/y.zip: a member of an archive
        is_far = outer.partition("://")[0].lower() in _NETWORK and all(part.startswith("zip://") for part in inner)
        return name if is_far else None
    if folder is None or name.startswith("/") or ".." in name.split("/"):
        return None
    return join(folder, name)


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
