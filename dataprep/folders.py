"""Image folders as sources: `metadata.jsonl` or `metadata.csv` in any of its folders, a sidecar `NAME.txt` beside the image elsewhere."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dataprep.records import RawSample
from pipeline.captions import MAX_TEXT_BYTES
from pipeline.fields import IMAGE_EXTENSIONS, Fields, read_fields

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
MAX_LINE_BYTES = 16 << 20


class ImageFolder:
    """A folder of pictures, read recursively in sorted order; hidden files and links to folders are passed over.

    A metadata file speaks for its folder and all below it: pictures that it does not list are no inputs, and are counted in `notes()`.
    """

    layout = "folder"

    def __init__(self, path: Path, *, name: str) -> None:
        self.path = path
        self.root = path.resolve()
        self.name = name
        self._sizes = dict(_list_files(path))
        self._metadata = _metadata_files(self._sizes)
        if not self._metadata and not any(file.lower().endswith(IMAGE_SUFFIXES) for file in self._sizes):
            raise ValueError(f"{path}: no pictures and no metadata in this folder{self._hint()}")
        self._tables = {folder: (path / file).read_bytes() for folder, file in self._metadata.items()}
        self._listed: set[str] = set()
        self._unreadable = 0

    def digest(self) -> str:
        """Names and sizes of all files and the contents of the metadata: what makes this source the same as another day's."""
        digest = hashlib.sha256()
        for file, size in self._sizes.items():
            digest.update(f"{file}\0{size}\n".encode("utf-8", "surrogateescape"))
        for folder, table in self._tables.items():
            digest.update(f"{folder}\0{hashlib.sha256(table).hexdigest()}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def samples(self) -> Iterator[RawSample]:
        """All inputs in a fixed order: the rows of the metadata files, then the pictures that no metadata speaks for."""
        self._listed.clear()
        for folder, file in self._metadata.items():
            records = _read_jsonl(self._tables[folder]) if file.endswith(".jsonl") else _read_csv(self._tables[folder])
            for line, record in records:
                yield self._from_metadata(record, folder=folder, where=f"{file}:{line}")
        for file in self._sizes:
            if file.lower().endswith(IMAGE_SUFFIXES) and not self._is_governed(file):
                yield self._from_sidecar(file)

    def notes(self) -> list[str]:
        """What lies in the folder and is no input, in sentences. Complete once `samples()` has been read to its end."""
        unlisted = sum(
            1 for file in self._sizes if file.lower().endswith(IMAGE_SUFFIXES) and self._is_governed(file) and file not in self._listed
        )
        tars = sum(1 for file in self._sizes if file.lower().endswith((".tar", ".tgz", ".tar.gz")))
        stems = {os.path.splitext(file)[0] for file in self._sizes if file.lower().endswith(IMAGE_SUFFIXES)}
        texts = sum(
            1 for file in self._sizes if file.endswith(".txt") and not self._is_governed(file) and os.path.splitext(file)[0] not in stems
        )
        counted = (
            (unlisted, "image(s) not listed by its metadata were left out"),
            (tars, "tar file(s) inside the folder are no part of it: name them as sources of their own"),
            (texts, "text file(s) without an image of the same name were left out"),
        )
        return [f"{self.name}: {count} {what}" for count, what in counted if count]

    def _hint(self) -> str:
        tar = next((file for file in self._sizes if file.endswith(".tar")), None)
        return f"; to read its shards, name them: {self.path / tar}" if tar else ""

    def _is_governed(self, file: str) -> bool:
        return bool(self._metadata) and any(str(parent) in self._metadata for parent in PurePosixPath(file).parents)

    def _from_metadata(self, record: dict | str, *, folder: str, where: str) -> RawSample:
        if isinstance(record, str):
            return RawSample(source=self.name, path=where, reason="bad-record", detail=record)
        file_name = record.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            return RawSample(source=self.name, path=where, reason="bad-record", detail=f"{where} has no file_name")
        inside = os.path.normpath(os.path.join(folder, file_name)).replace(os.sep, "/")
        if os.path.isabs(file_name) or inside.startswith("../") or "\0" in file_name:
            return RawSample(source=self.name, path=where, reason="bad-record", detail=f"{where} names a file outside its folder")
        self._listed.add(inside)
        return self._sample(inside, fields=read_fields(record), found=inside in self._sizes)

    def _from_sidecar(self, file: str) -> RawSample:
        text = os.path.splitext(file)[0] + ".txt"
        captions: tuple[str, ...] = ()
        if text in self._sizes:
            with open(self.path / text, "rb") as stream:
                captions = (stream.read(MAX_TEXT_BYTES).decode("utf-8-sig", "replace"),)
        return self._sample(file, fields=Fields(captions=captions, label=None, extra={}), found=True)

    def _sample(self, file: str, *, fields: Fields, found: bool) -> RawSample:
        return RawSample(
            source=self.name,
            path=file,
            file=str(self.path / file),
            captions=fields.captions,
            label=fields.label,
            extra=fields.extra,
            reason="" if found else "missing",
            detail="" if found else "no such file in the folder",
        )


def _list_files(root: Path) -> Iterator[tuple[str, int]]:
    """Every visible file below `root` as (path relative to it with forward slashes, size), sorted."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path)


def _metadata_files(sizes: dict[str, int]) -> dict[str, str]:
    """Folder ("." for the root) → its metadata file; the JSON lines win where a folder has both kinds."""
    files: dict[str, str] = {}
    for name in METADATA_NAMES:
        for file in sizes:
            if PurePosixPath(file).name == name:
                files.setdefault(str(PurePosixPath(file).parent), file)
    return dict(sorted(files.items()))


def _read_jsonl(table: bytes) -> Iterator[tuple[int, dict | str]]:
    """(line number from 1, the record, or what is wrong with the line as a string)"""
    for number, line in enumerate(table.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict | str:
    if len(line) > MAX_LINE_BYTES:
        return f"a line of {len(line)} bytes"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else f"not a JSON object but {type(record).__name__}"


def _read_csv(table: bytes) -> Iterator[tuple[int, dict | str]]:
    """(line number from 1, the row by its header's names, or what is wrong with it as a string)"""
    text = io.StringIO(table.decode("utf-8-sig", "replace"), newline="")
    reader = csv.reader(text, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"not CSV: {error}"
            continue
        if header is None:
            header = [name.strip() for name in row]
            repeated = [name for name, count in Counter(header).items() if count > 1]
            if repeated:
                yield 1, f"the header repeats {repeated[0]}"
                return
        elif len(row) == len(header):
            yield reader.line_num, dict(zip(header, row, strict=True))
        elif row:
            yield reader.line_num, f"{len(row)} columns where the header has {len(header)}"
