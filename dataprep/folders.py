"""Image folders as sources: pictures with a `metadata` table, with files beside them, or with their folders' names as classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import tee
from pathlib import Path, PurePosixPath

from dataprep.columns import ColumnConfig, choose, describe, of_json
from dataprep.listing import Listing
from dataprep.lists import sample_of
from dataprep.places import base_name, join, read_texts
from dataprep.records import RawSample
from dataprep.tables import Table
from pipeline.errors import one_line
from pipeline.fields import IMAGE_EXTENSIONS, STANDARD, Fields, Value, parse_json, read_fields
from pipeline.remote import is_remote

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SIDECARS = (".txt", ".caption", ".json")  # in order of preference
CLASS_NAME = "class_name"


def holds_images(files: Listing) -> bool:
    """Whether the files of a folder make it an image folder."""
    return any(_is_image(file) or base_name(file) in METADATA_NAMES for file in files)


class ImageFolder:
    """A folder of pictures, read recursively in sorted order; hidden files and links to folders are passed over.

    A metadata file speaks for its folder and all below it: pictures that it does not list are no inputs, and are counted in `notes()`.
    `files` are all files below `path`, a folder or its URL.
    """

    layout = "folder"
    tags: tuple[str, ...] = ()

    def __init__(self, path: str, *, files: Listing, name: str, columns: ColumnConfig) -> None:
        self.path = path
        self.root = None if is_remote(path) else Path(path).resolve()
        self.name = name
        self._files = files
        self._metadata = _metadata_files(files)
        self._tables = {folder: Table(join(path, file)) for folder, file in self._metadata.items()}
        self._columns = {
            folder: choose(columns, names=table.names, place=table.file, defaults=STANDARD) for folder, table in self._tables.items()
        }
        self._sidecar_columns = of_json(columns)
        self._classes = self._find_classes(columns.folders)
        self._listed = bytearray(len(files))  # of each file, whether its metadata has a row for it

    def reads(self) -> str:
        """What is read, and from which columns, in a sentence."""
        read = list(dict.fromkeys(f"{self._tables[folder].name}, {describe(columns)}" for folder, columns in self._columns.items()))
        if self._classes:
            first, last = min(self._classes), max(self._classes)
            read.append(f"the names of {len(self._classes)} folders as classes ({first} is 0, {last} is {len(self._classes) - 1})")
        elif not read or any(True for _ in self._own_images()):
            found = [suffix for suffix in _SIDECARS if any(file.endswith(suffix) for file in self._files)]
            read.append(f"captions from {', '.join(found)} beside the images" if found else "images without captions or classes")
        return f"{self.name}: {'; '.join(read)}"

    def expected(self) -> int | None:
        """How many inputs there are, where that is known without reading them."""
        return None if self._metadata else sum(1 for _ in self._images())

    def digest(self) -> str:
        """Names and sizes of all files and the contents of the metadata: what makes this source the same as another day's."""
        digest = self._files.digest()
        for folder, table in self._tables.items():
            digest.update(f"{folder}\0{table.digest()}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All inputs in a fixed order: the rows of the metadata files, then the pictures that no metadata speaks for."""
        self._listed = bytearray(len(self._files))
        for folder, table in self._tables.items():
            for line, record in table.rows():
                yield self._from_metadata(record, folder=folder, where=f"{self._metadata[folder]}:{line}")
        yield from self._from_sidecars()

    def notes(self) -> list[str]:
        """What lies in the folder and is no input, in sentences. Complete once `samples()` has been read to its end."""
        unlisted = texts = 0
        for folder, names in self._files.folders():
            if self._is_governed(folder):
                numbers = (self._files.number(folder + name) for name in names if _is_image(name))
                unlisted += sum(number is not None and not self._listed[number] for number in numbers)
            else:
                stems = {os.path.splitext(name)[0] for name in names if _is_image(name)}
                texts += sum(name.endswith((".txt", ".caption")) and os.path.splitext(name)[0] not in stems for name in names)
        tars = sum(file.lower().endswith((".tar", ".tgz", ".tar.gz")) for file in self._files)
        counted = (
            (unlisted, "image(s) not listed by its metadata were left out"),
            (tars, "tar file(s) inside the folder are no part of it: name them as sources of their own"),
            (texts, "text file(s) without an image of the same name were left out"),
        )
        return [f"{self.name}: {count} {what}" for count, what in counted if count]

    def _images(self) -> Iterator[str]:
        return (file for file in self._files if _is_image(file))

    def _own_images(self) -> Iterator[str]:
        """The pictures that no metadata speaks for."""
        for folder, names in self._files.folders():
            if not self._is_governed(folder):
                yield from (folder + name for name in names if _is_image(name))

    def _is_governed(self, folder: str) -> bool:
        path = PurePosixPath(folder)
        return any(str(parent) in self._metadata for parent in (path, *path.parents))

    def _find_classes(self, asked: bool | None) -> dict[str, int]:
        """Folder name → class: where it is asked for, or where the only thing that is known of each picture is the folder it lies in."""
        if asked is False:
            return {}
        names = {PurePosixPath(folder).name for folder, names in self._files.folders() if any(map(_is_image, names))}
        if asked is None:
            has_texts = any(file.endswith(_SIDECARS) for file in self._files)
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
        number = self._files.number(inside)
        if number is not None:
            self._listed[number] = True
        sample = sample_of(record, source=self.name, columns=columns, where=where, folder=self.path)
        sample = replace(sample, path=inside, file=join(self.path, inside))
        if number is None:
            sample = replace(sample, reason="missing", detail="no such file in the folder")
        return self._with_class(sample)

    def _from_sidecars(self) -> Iterator[RawSample]:
        images, ahead = tee(self._own_images())
        beside = (os.path.splitext(file)[0] + suffix for file in ahead for suffix in _SIDECARS)
        texts = read_texts(join(self.path, text) if text in self._files else None for text in beside)
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


def _metadata_files(files: Listing) -> dict[str, str]:
    """Folder ("." for the root) → its metadata file; where a folder has several kinds, JSON lines win, then CSV."""
    found: dict[str, str] = {}
    for folder, _ in files.folders():
        named = [folder + name for name in METADATA_NAMES if folder + name in files]
        if named:
            found[str(PurePosixPath(folder))] = named[0]
    return dict(sorted(found.items()))
