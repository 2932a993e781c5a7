"""Count the files of a folder that are not read, by kind, for notes of one line each."""

from __future__ import annotations

from collections.abc import Iterable

from dataprep.sources.files.paths import base_name, join, read_texts
from dataprep.sources.tabular.tables import kind_of
from dataprep.sources.webdataset import TAR_SUFFIXES
from pipeline.bounded_counter import MAX_NAMES, BoundedCounter, listed

_ARCHIVES = (".zip", ".7z", ".rar", ".tar.bz2", ".tar.xz", ".tbz2", ".txz")
_MAX_TEXTS = 20  # text files whose first line is read
_COLUMNS = {"image", "images", "image_path", "image_name", "file_name", "filename", "file", "path", "url", "caption", "captions", "text"}


class UnreadFiles:
    """Counts the unread files of a source in `folder`, a path or URL."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._kinds = BoundedCounter()
        self._tars = self._archives = self._tables = self._texts = 0
        self._named_archives: list[str] = []
        self._named_tables: list[str] = []
        self._texts_to_check: list[str] = []

    def add(self, file: str) -> None:
        """Count a file that is not read."""
        lower = file.lower()
        if lower.endswith(TAR_SUFFIXES):
            self._tars += 1
        elif lower.endswith(_ARCHIVES):
            self._archives += 1
            self._named_archives += [file] if len(self._named_archives) < MAX_NAMES else []
        elif kind_of(file) or lower.endswith(".json"):
            self._add_table(file)
        else:
            self._kinds.add(extension_of(file))

    def add_text(self, file: str) -> None:
        """Count a text file without an image."""
        self._texts += 1
        if file.lower().endswith(".txt") and len(self._texts_to_check) < _MAX_TEXTS:
            self._texts_to_check.append(file)

    def notes(self) -> list[str]:
        """One sentence for each kind of file."""
        heads = read_texts(join(self._folder, file) for file in self._texts_to_check)
        for file, head in zip(self._texts_to_check, heads, strict=True):
            if isinstance(head, bytes) and _looks_like_table(head):
                self._texts -= 1
                self._add_table(file)
        self._texts_to_check.clear()
        notes = [f"not read: {self._kinds}"] if self._kinds.total() else []
        if self._archives:
            notes.append(f"not read: {listed(self._named_archives, count=self._archives)}; unpack archives to use what is in them")
        if self._tables:
            named = listed(self._named_tables, count=self._tables)
            example = join(self._folder, self._named_tables[0])
            how = f"give a table as a source of its own (tim prepare {example}), or name it metadata.csv or metadata.jsonl"
            notes.append(f"tables and JSON files that were not used: {named}; {how}")
        if self._tars:
            notes.append(f"{self._tars} tar file(s) inside the folder are no part of it: name them as sources of their own")
        if self._texts:
            notes.append(f"{self._texts} text file(s) without an image of the same name were left out")
        return notes

    def _add_table(self, file: str) -> None:
        self._tables += 1
        self._named_tables += [file] if len(self._named_tables) < MAX_NAMES else []


def unread_notes(folder: str, files: Iterable[str]) -> list[str]:
    """Notes on the unread files of a folder."""
    unread = UnreadFiles(folder)
    for file in files:
        unread.add(file)
    return unread.notes()


def extension_of(file: str) -> str:
    """ ".svg" of "a/b.SVG", or "without extension"."""
    stem, dot, extension = base_name(file).lower().rpartition(".")
    return f".{extension}" if dot and stem else "without extension"


def _looks_like_table(head: bytes) -> bool:
    """Whether the first line is a header such as `image,caption`."""
    line = head.partition(b"\n")[0][:1000].decode("utf-8-sig", "ignore").strip().lower()
    fields = [field.strip(' "') for field in line.replace("\t", ",").replace("|", ",").split(",")]
    return len(fields) > 1 and not _COLUMNS.isdisjoint(fields)
