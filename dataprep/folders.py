"""Image folders as sources: pictures with a `metadata` table, with files beside them, or with their folders' names as classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePosixPath

from dataprep.columns import ColumnConfig, choose, describe, of_json
from dataprep.lists import sample_of
from dataprep.places import join, read_texts
from dataprep.records import RawSample
from dataprep.tables import Table
from pipeline.errors import one_line
from pipeline.fields import IMAGE_EXTENSIONS, STANDARD, Fields, Value, parse_json, read_fields
from pipeline.remote import is_remote

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SIDECARS = (".txt", ".caption", ".json")  # in order of preference
CLASS_NAME = "class_name"


def holds_images(files: Mapping[str, int | None]) -> bool:
    """Whether the files of a folder make it an image folder."""
    return any(_is_image(file) or PurePosixPath(file).name in METADATA_NAMES for file in files)


class ImageFolder:
    """A folder of pictures, read recursively in sorted order; hidden files and links to folders are passed over.

    A metadata file speaks for its folder and all below it: pictures that it does not list are no inputs, and are counted in `notes()`.
    `files` are all files below `path`, a folder or its URL, with their sizes.
    """

    layout = "folder"
    tags: tuple[str, ...] = ()

    def __init__(self, path: str, *, files: Mapping[str, int | None], name: str, columns: ColumnConfig) -> None:
        self.path = path
        self.root = None if is_remote(path) else Path(path).resolve()
        self.name = name
        self._sizes = files
        self._metadata = _metadata_files(files)
        self._tables = {folder: Table(join(path, file)) for folder, file in self._metadata.items()}
        self._columns = {
            folder: choose(columns, names=table.names, place=table.file, defaults=STANDARD) for folder, table in self._tables.items()
        }
        self._sidecar_columns = of_json(columns)
        self._classes = self._find_classes(columns.folders)
        self._listed: set[str] = set()

    def reads(self) -> str:
        """What is read, and from which columns, in a sentence."""
        read = list(dict.fromkeys(f"{self._tables[folder].name}, {describe(columns)}" for folder, columns in self._columns.items()))
        if self._classes:
            first, last = min(self._classes), max(self._classes)
            read.append(f"the names of {len(self._classes)} folders as classes ({first} is 0, {last} is {len(self._classes) - 1})")
        elif not read or any(not self._is_governed(file) for file in self._images()):
            found = [suffix for suffix in _SIDECARS if any(file.endswith(suffix) for file in self._sizes)]
            read.append(f"captions from {', '.join(found)} beside the images" if found else "images without captions or classes")
        return f"{self.name}: {'; '.join(read)}"

    def expected(self) -> int | None:
        """How many inputs there are, where that is known without reading them."""
        return None if self._metadata else sum(1 for _ in self._images())

    def digest(self) -> str:
        """Names and sizes of all files and the contents of the metadata: what makes this source the same as another day's."""
        digest = hashlib.sha256()
        for file, size in self._sizes.items():
            digest.update(f"{file}\0{size}\n".encode("utf-8", "surrogateescape"))
        for folder, table in self._tables.items():
            digest.update(f"{folder}\0{table.digest()}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All inputs in a fixed order: the rows of the metadata files, then the pictures that no metadata speaks for."""
        self._listed.clear()
        for folder, table in self._tables.items():
            for line, record in table.rows():
                yield self._from_metadata(record, folder=folder, where=f"{self._metadata[folder]}:{line}")
        yield from self._from_sidecars()

    def notes(self) -> list[str]:
        """What lies in the folder and is no input, in sentences. Complete once `samples()` has been read to its end."""
        unlisted = sum(1 for file in self._images() if self._is_governed(file) and file not in self._listed)
        tars = sum(1 for file in self._sizes if file.lower().endswith((".tar", ".tgz", ".tar.gz")))
        stems = {os.path.splitext(file)[0] for file in self._images()}
        texts = sum(
            1
            for file in self._sizes
            if file.endswith((".txt", ".caption")) and not self._is_governed(file) and os.path.splitext(file)[0] not in stems
        )
        counted = (
            (unlisted, "image(s) not listed by its metadata were left out"),
            (tars, "tar file(s) inside the folder are no part of it: name them as sources of their own"),
            (texts, "text file(s) without an image of the same name were left out"),
        )
        return [f"{self.name}: {count} {what}" for count, what in counted if count]

    def _images(self) -> Iterator[str]:
        return (file for file in self._sizes if _is_image(file))

    def _is_governed(self, file: str) -> bool:
        return bool(self._metadata) and any(str(parent) in self._metadata for parent in PurePosixPath(file).parents)

    def _find_classes(self, asked: bool | None) -> dict[str, int]:
        """Folder name → class: where it is asked for, or where the only thing that is known of each picture is the folder it lies in."""
        if asked is False:
            return {}
        names = {PurePosixPath(file).parent.name for file in self._images()}
        if asked is None:
            has_texts = any(file.endswith(_SIDECARS) for file in self._sizes)
            if self._metadata or has_texts or "" in names or len(names) < 2:
                return {}
        return {name: number for number, name in enumerate(sorted(names - {""}))}

    def _from_metadata(self, record: Mapping[str, Value] | str, *, folder: str, where: str) -> RawSample:
        columns = self._columns[folder]
        if isinstance(record, str):
            return RawSample(source=self.name, path=where, reason="bad-record", detail=record)
        file_name = record.get(columns.image)
        if not isinstance(file_name, str) or not file_name:
            return RawSample(source=self.name, path=where, reason="bad-record", detail=f"{where} has no {columns.image}")
        inside = os.path.normpath(os.path.join(folder, file_name)).replace(os.sep, "/")
        if os.path.isabs(file_name) or inside.startswith("../") or "\0" in file_name:
            return RawSample(source=self.name, path=where, reason="bad-record", detail=f"{where} names a file outside its folder")
        self._listed.add(inside)
        sample = sample_of(record, source=self.name, columns=columns, where=where, folder=self.path)
        sample = replace(sample, path=inside, file=join(self.path, inside))
        if inside not in self._sizes:
            sample = replace(sample, reason="missing", detail="no such file in the folder")
        return self._with_class(sample)

    def _from_sidecars(self) -> Iterator[RawSample]:
        images = [file for file in self._images() if not self._is_governed(file)]
        beside = ([os.path.splitext(file)[0] + suffix for suffix in _SIDECARS] for file in images)
        texts = read_texts(join(self.path, text) if text in self._sizes else None for text in chain.from_iterable(beside))
        for file, plain, caption, told in zip(images, texts, texts, texts, strict=False):
            yield self._with_class(self._from_texts(file, texts=(plain, caption), told=told))

    def _from_texts(self, file: str, *, texts: tuple[bytes | OSError | None, ...], told: bytes | OSError | None) -> RawSample:
        unread = next((text for text in (*texts, told) if isinstance(text, OSError)), None)
        record = parse_json(told) if isinstance(told, bytes) else {}
        if unread is not None or record is None:
            detail = f"its text cannot be read: {one_line(unread)}" if unread else "the .json beside it is not a JSON object"
            return RawSample(source=self.name, path=file, reason="bad-record", detail=detail)
        fields = read_fields(record, columns=self._sidecar_columns) if record else Fields(captions=(), label=None, extra={})
        captions = tuple(text.decode("utf-8-sig", "replace") for text in texts if isinstance(text, bytes))
        return RawSample(
            source=self.name,
            path=file,
            file=join(self.path, file),
            captions=captions + fields.captions,
            label=fields.label,
            extra=fields.extra,
        )

    def _with_class(self, sample: RawSample) -> RawSample:
        name = PurePosixPath(sample.path).parent.name
        if name not in self._classes:
            return sample
        return replace(sample, label=self._classes[name], extra={**sample.extra, CLASS_NAME: name})


def _is_image(file: str) -> bool:
    return file.lower().endswith(IMAGE_SUFFIXES)


def _metadata_files(files: Mapping[str, int | None]) -> dict[str, str]:
    """Folder ("." for the root) → its metadata file; where a folder has several kinds, JSON lines win, then CSV."""
    found: dict[str, str] = {}
    for name in METADATA_NAMES:
        for file in files:
            if PurePosixPath(file).name == name:
                found.setdefault(str(PurePosixPath(file).parent), file)
    return dict(sorted(found.items()))
