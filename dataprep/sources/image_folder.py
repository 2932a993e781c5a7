"""Image folders as sources: images with a `metadata` table, with text files beside them, or with folder names as classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, tee
from pathlib import Path, PurePosixPath

from dataprep.sources.class_labels import text_labels
from dataprep.sources.column_mapping import FILE_NAME, ColumnConfig, choose, describe, describe_encoding, of_json, with_file_name
from dataprep.sources.files.file_listing import Listing, folded
from dataprep.sources.files.paths import base_name, join, read_texts
from dataprep.sources.image_list import sample_of
from dataprep.sources.masks import FolderMasks
from dataprep.sources.raw_sample import RawSample
from dataprep.sources.tabular.tables import Table
from dataprep.sources.unread_files import UnreadFiles
from pipeline.bounded_counter import listed, printable
from pipeline.corpus.json_record import parse_json
from pipeline.corpus.record_fields import CLASS_NAME, IMAGE_EXTENSIONS, STANDARD, Fields, Value, read_fields
from pipeline.corpus.text_decoding import UndecodableText, decode_text
from pipeline.errors import one_line
from pipeline.storage.remote import is_remote

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXTS = (".txt", ".caption")
_SIDECARS = (*_TEXTS, ".json")  # in order of preference
_DRIVE = re.compile(r"[A-Za-z]:/")


def holds_images(files: Listing) -> bool:
    """Whether a folder with these files is an image folder."""
    return any(_is_image(file) or base_name(file) in METADATA_NAMES for file in files)


class ImageFolder:
    """A folder of images, read recursively in sorted order, linked folders last. Hidden files are skipped.

    A metadata file covers its folder and all folders below: images that it does not list are not inputs, and are counted in `notes()`.
    Elsewhere a text belongs to the image of the same name: `a.txt` or `a.jpg.txt` to `a.jpg`, with the suffix in any case. If no text has
    the exact name of an image, one that differs in case belongs to it. `files`: all files below `path`, a folder or its URL.
    """

    layout = "folder"
    tags: tuple[str, ...] = ()

    def __init__(self, path: str, *, files: Listing, name: str, columns: ColumnConfig) -> None:
        self.path = path
        self.root = None if is_remote(path) else Path(path).resolve()
        self.name = name
        self._files = files
        self._masks = FolderMasks(path, files=files, elsewhere=columns.masks)
        self._metadata = _metadata_files(files)
        self._tables = {folder: Table(join(path, file), encoding=columns.encoding or "") for folder, file in self._metadata.items()}
        self._columns = {
            folder: choose(columns, names=table.names, origin=table.file, defaults=STANDARD) for folder, table in self._tables.items()
        }
        self._sidecar_columns = of_json(columns)
        self._has_caption_columns = columns.captions is not None
        self._suffixes = self._find_suffixes()
        self._classes = self._find_classes(columns.folders)
        self._matched: Counter[str] = Counter()
        self._matched_in_case: set[str] = set()  # texts whose names differ from their image's in case
        self._useless_json = 0
        self.classes: Mapping[str, int] = {}  # text label in the metadata → class
        self._listed = bytearray(len(files))  # for each file: whether its metadata has a row for it

    def reads(self) -> str:
        """One sentence on what is read, and from which columns."""
        read = list(dict.fromkeys(f"{self._tables[folder].name}, {describe(columns)}" for folder, columns in self._columns.items()))
        if self._classes:
            first, last = min(self._classes), max(self._classes)
            read.append(f"the names of {len(self._classes)} folders as classes ({first} is 0, {last} is {len(self._classes) - 1})")
        elif not read or any(True for _ in self._own_images()):
            found = [suffix for suffix in _SIDECARS if suffix in self._suffixes]
            origins = [f"{', '.join(found)} beside the images"] if found else []
            origins += ["the names of the files"] if FILE_NAME in self._sidecar_columns.captions else []
            encoding = describe_encoding(self._sidecar_columns) if found else ""
            read.append(f"captions from {' and '.join(origins)}{encoding}" if origins else "images without captions or classes")
        return f"{self.name}: {'; '.join(read)}"

    def expected(self) -> int | None:
        """Number of inputs, None if it is unknown before they are read."""
        return None if self._metadata else sum(1 for _ in self._images())

    def digest(self) -> str:
        """Digest of the names and sizes of all files, and of the contents of the metadata."""
        digest = self._files.digest()
        digest.update(self._masks.digest().encode())
        for folder, table in self._tables.items():
            digest.update(f"{folder}\0{table.digest()}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def class_names(self) -> set[str]:
        """The text labels in the metadata."""
        return {name for folder, table in self._tables.items() for name in text_labels([table], columns=self._columns[folder])}

    def samples(self) -> Iterator[RawSample]:
        """All inputs in a fixed order: the rows of the metadata files, then the images without metadata."""
        self._listed = bytearray(len(self._files))
        self._matched.clear()
        self._matched_in_case.clear()
        self._useless_json = 0
        for folder, table in self._tables.items():
            for line, record in table.rows():
                yield self._from_metadata(record, folder=folder, where=f"{self._metadata[folder]}:{line}")
        yield from self._from_sidecars()

    def notes(self) -> list[str]:
        """One sentence for each kind of file that is not an input. Complete once `samples()` is exhausted."""
        unlisted = 0
        unread = UnreadFiles(self.path)
        used = {*self._metadata.values(), *self._matched_in_case}  # besides images and texts of exactly their names
        for folder, names in self._files.folders():
            governed = self._is_governed(folder)
            images = set() if governed else {_stem(name) for name in names if self._is_input(folder, name)}
            for name in names:
                file = folder + name
                if self._masks.holds(file):
                    continue
                if _is_image(name):
                    number = self._files.number(file) if governed else None
                    unlisted += number is not None and not self._listed[number]
                elif file in used or (not governed and self._belongs(folder, name, stems=images)):
                    continue
                elif not governed and name.lower().endswith(_TEXTS):
                    unread.add_text(file)
                else:
                    unread.add(file)
        notes = [f"{unlisted} image(s) not listed by its metadata were left out"] if unlisted else []
        notes += [f"{count} file name(s) of the metadata were taken {how}" for how, count in sorted(self._matched.items())]
        if self._useless_json:
            notes.append(f"{self._useless_json} .json file(s) beside images and their texts are not JSON objects and were not used")
        return [f"{self.name}: {note}" for note in (*notes, *self._masks.notes(), *unread.notes(), *self._files.notes)]

    def _is_input(self, folder: str, name: str) -> bool:
        """Whether a file is an image, not a mask."""
        return _is_image(name) and not self._masks.holds(folder + name)

    def _images(self) -> Iterator[str]:
        return (file for file in self._files if self._is_input("", file))

    def _own_images(self) -> Iterator[str]:
        """The images without metadata."""
        for folder, names in self._files.folders():
            if not self._is_governed(folder):
                yield from (folder + name for name in names if self._is_input(folder, name))

    def _is_governed(self, folder: str) -> bool:
        path = PurePosixPath(folder)
        return any(str(parent) in self._metadata for parent in (path, *path.parents))

    def _find_classes(self, requested: bool | None) -> dict[str, int]:
        """Folder name → class, if requested, or if the images have no other text or class."""
        if requested is False:
            return {}
        names = {
            PurePosixPath(folder).name for folder, names in self._files.folders() if any(self._is_input(folder, name) for name in names)
        }
        if requested is None:
            has_texts = self._metadata or self._suffixes or FILE_NAME in self._sidecar_columns.captions
            if has_texts or "" in names or len(names) < 2:
                return {}
        return {name: number for number, name in enumerate(sorted(names - {""}))}

    def _find_suffixes(self) -> set[str]:
        """The suffixes of texts that belong to an image."""
        found: set[str] = set()
        for folder, names in self._files.folders():
            if self._is_governed(folder) or not any(name.lower().endswith(_SIDECARS) for name in names):
                continue
            stems = {_stem(name) for name in names if _is_image(name)}
            alike = {folded(stem) for stem in stems}
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if suffix in _SIDECARS and suffix not in found:
                    found |= {suffix} if self._belongs(folder, name, stems=stems) or folded(_stem(name)) in alike else set()
            if len(found) == len(_SIDECARS):
                break
        return found

    def _belongs(self, folder: str, name: str, *, stems: Collection[str]) -> bool:
        """Whether a text has the name of an image in its folder. `stems`: those of all images in the folder."""
        if not name.lower().endswith(_SIDECARS):
            return False
        stem = _stem(name)
        return stem in stems or (_is_image(stem) and folder + stem in self._files)

    def _texts_of_image(self, file: str) -> list[str]:
        """The texts that belong to an image, in order of preference."""
        if not self._suffixes:
            return []
        stem = _stem(file)
        found = [text for text in self._files.starting(f"{stem}.") if _is_text_of(text, image=file)]
        if not found:
            alike = [text for text in self._files.starting(f"{stem}.", folds=True) if _is_text_of(folded(text), image=folded(file))]
            found = [text for text in alike if not self._has_own_image(text)]
            self._matched_in_case.update(found)
        return sorted(found, key=lambda text: (_SIDECARS.index(os.path.splitext(text)[1].lower()), len(text), text))

    def _has_own_image(self, text: str) -> bool:
        stem = _stem(text)
        own = (file for file in self._files.starting(f"{stem}.") if _is_image(file) and _stem(file) == stem)
        return next(own, None) is not None or (_is_image(stem) and stem in self._files)

    def _from_metadata(self, record: Mapping[str, Value] | str, *, folder: str, where: str) -> RawSample:
        columns = self._columns[folder]
        if isinstance(record, str):
            return RawSample(source=self.name, path=where, reason="bad-record", detail=record)
        file_name = record.get(columns.image)
        if not isinstance(file_name, str) or not file_name:
            return RawSample(source=self.name, path=where, reason="bad-record", detail=f"{where} has no {columns.image}")
        inside = self._find(file_name, folder=folder)
        if inside is None:
            detail = f"{where} names a file outside its folder: {printable(file_name)}; paths start from the folder of the metadata"
            return RawSample(source=self.name, path=where, reason="bad-record", detail=detail)
        number = self._files.number(inside)
        if number is not None:
            self._listed[number] = True
        record = {**record, columns.image: inside}
        sample = sample_of(record, source=self.name, columns=columns, where=where, folder=self.path, classes=self.classes)
        sample = replace(sample, path=inside, file=join(self.path, inside))
        if number is None:
            sample = replace(sample, reason="missing", detail=f"no such file in the folder{self._hint(inside)}")
        return self._completed(sample)

    def _find(self, file_name: str, *, folder: str) -> str | None:
        """The file that a row of metadata names, relative to the source; None if it is outside."""
        inside = _normal(os.path.join(folder, file_name))
        if inside in self._files or "\0" in file_name:
            return None if "\0" in file_name else inside
        name, how = file_name, []
        if "\\" in name:
            name, how = name.replace("\\", "/"), ["with backslashes"]
        roots = [self.path.rstrip("/"), *([os.path.abspath(self.path), str(self.root)] if self.root else [])]
        root = next((root for root in roots if name.startswith(f"{root}/")), None)
        if root is not None:
            how.append("by a path from the root")
        inside = _normal(name[len(root) + 1 :] if root is not None else os.path.join(folder, name))
        if os.path.isabs(inside) or inside.startswith("../") or inside == ".." or _DRIVE.match(name):
            return None
        if inside not in self._files:
            alike = [file for file in self._files.alike(inside) if _is_image(file)]
            if len(alike) != 1:
                return inside
            inside, how = alike[0], [*how, "in another case or Unicode form"]
        if how:
            self._matched[" and ".join(how)] += 1
        return inside

    def _hint(self, inside: str) -> str:
        """Hint on similar files for a missing file."""
        alike = self._files.alike(inside)
        if len(alike) > 1:
            return f"; {listed(alike, count=len(alike))} differ from it in case only"
        longer = [file for file in self._files.starting(f"{inside}.") if _is_image(file) and _stem(file) == inside]
        return f"; there is {printable(longer[0])}" if longer else ""

    def _from_sidecars(self) -> Iterator[RawSample]:
        images, ahead = tee((file, self._texts_of_image(file)) for file in self._own_images())
        contents = read_texts(join(self.path, text) for _, texts in ahead for text in texts)
        for file, names in images:
            yield self._completed(self._from_texts(file, texts=list(zip(names, islice(contents, len(names)), strict=True))))

    def _from_texts(self, file: str, *, texts: Sequence[tuple[str, bytes | OSError | None]]) -> RawSample:
        unread = next((content for _, content in texts if isinstance(content, OSError)), None)
        encoding = self._sidecar_columns.encoding
        try:
            plain = [
                decode_text(content, encoding=encoding) for name, content in texts if isinstance(content, bytes) and not _is_json(name)
            ]
            parsed = [parse_json(content, encoding=encoding) for name, content in texts if isinstance(content, bytes) and _is_json(name)]
        except UndecodableText as error:
            return RawSample(source=self.name, path=file, reason="bad-record", detail=f"the text beside it is {error}")
        records, useless = [one for one in parsed if isinstance(one, dict)], [one for one in parsed if isinstance(one, str)]
        if unread is not None or (useless and not any(plain)):
            detail = f"its text cannot be read: {one_line(unread)}" if unread else f"the .json beside it is {useless[0]}"
            return RawSample(source=self.name, path=file, reason="bad-record", detail=detail)
        self._useless_json += len(useless)
        record: Mapping[str, Value] = {}
        for more in reversed(records):
            record = {**record, **more}
        record = with_file_name(record, columns=self._sidecar_columns, name=file)
        fields = read_fields(record, columns=self._sidecar_columns) if record else Fields(captions=(), label=None, extra={})
        captions = tuple(plain)
        return RawSample(
            source=self.name,
            path=file,
            file=join(self.path, file),
            captions=fields.captions + captions if self._has_caption_columns else captions + fields.captions,
            label=fields.label,
            extra=fields.extra,
        )

    def _completed(self, sample: RawSample) -> RawSample:
        """With its mask, and with its folder's class."""
        sample = replace(sample, mask=self._masks.of(sample.path))
        name = PurePosixPath(sample.path).parent.name
        if name not in self._classes:
            return sample
        return replace(sample, label=self._classes[name], extra={**sample.extra, CLASS_NAME: name})


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _is_text_of(text: str, *, image: str) -> bool:
    """`a.txt` and `a.jpg.txt` are texts of `a.jpg`."""
    stem, suffix = os.path.splitext(text)
    return suffix.lower() in _SIDECARS and stem in (image, _stem(image))


def _is_json(file: str) -> bool:
    return file.lower().endswith(".json")


def _normal(path: str) -> str:
    return os.path.normpath(path).replace(os.sep, "/")


def _is_image(file: str) -> bool:
    return file.lower().endswith(IMAGE_SUFFIXES)


def _metadata_files(files: Listing) -> dict[str, str]:
    """Folder ("." for the root) → its metadata file. JSON lines are preferred, then CSV."""
    found: dict[str, str] = {}
    for folder, _ in files.folders():
        named = [folder + name for name in METADATA_NAMES if folder + name in files]
        if named:
            found[str(PurePosixPath(folder))] = named[0]
    return dict(sorted(found.items()))
