"""A listing of the files below a folder, for many millions of files: little more memory than their names, with lookup by name."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping


class Listing:
    """All files below a folder, as relative paths with forward slashes: the files of a folder in order, then its folders in order.

    `folders`: each folder with files, as `a/b/` ("" for the root), and the sizes in bytes (None: unknown) of its files by name.
    `notes`: phrases on the folder for people.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, folders: Iterable[tuple[str, Mapping[str, int | None]]]) -> None:
        self._folders: dict[str, _Names] = {}
        self._alike: dict[str, list[str]] | None = None  # folded name → folders
        self._digest = hashlib.sha256()
        for folder, sizes in folders:
            names = sorted(sizes)
            self._folders[folder] = _Names(names, before=len(self))
            for name in names:
                self._digest.update(f"{folder}{name}\0{sizes[name]}\n".encode("utf-8", "surrogateescape"))

    @classmethod
    def of_files(cls, sizes: Mapping[str, int | None]) -> Listing:
        """A listing from relative path → size."""
        folders: dict[str, dict[str, int | None]] = {}
        for file, size in sizes.items():
            name = file.rpartition("/")[2]
            folders.setdefault(file[: len(file) - len(name)], {})[name] = size
        return cls((folder, folders[folder]) for folder in sorted(folders, key=lambda folder: folder.split("/")))

    def __len__(self) -> int:
        last = next(reversed(self._folders.values()), None)
        return last.before + len(last) if last else 0

    def __iter__(self) -> Iterator[str]:
        for folder, names in self.folders():
            yield from (folder + name for name in names)

    def __contains__(self, file: str) -> bool:
        return self.number(file) is not None

    def folders(self) -> Iterator[tuple[str, Iterable[str]]]:
        """Each folder with the names of its files, which can be iterated again."""
        yield from self._folders.items()

    def number(self, file: str) -> int | None:
        """The position of a file in the listing, None if it does not exist."""
        name = file.rpartition("/")[2]
        names = self._folders.get(file[: len(file) - len(name)])
        index = None if names is None else names.find(name)
        return None if names is None or index is None else names.before + index

    def starting(self, prefix: str, *, folds: bool = False) -> Iterator[str]:
        """The files of a folder whose names start with `prefix`; with `folds`, in any case and Unicode form."""
        name = prefix.rpartition("/")[2]
        folder = prefix[: len(prefix) - len(name)]
        names = self._folders.get(folder)
        if names is not None:
            yield from (folder + found for found in (names.starting_alike(name) if folds else names.starting(name)))

    def alike(self, file: str) -> list[str]:
        """The files whose paths differ from `file` only in case and Unicode form."""
        if self._alike is None:
            self._alike = {}
            for folder in self._folders:
                self._alike.setdefault(folded(folder), []).append(folder)
        name = file.rpartition("/")[2]
        folders = self._alike.get(folded(file[: len(file) - len(name)]), [])
        wanted = folded(file)
        return [found for folder in folders for found in self.starting(folder + name, folds=True) if folded(found) == wanted]

    def digest(self) -> hashlib._Hash:
        """A copy of the sha256 of all names and sizes, to update further."""
        return self._digest.copy()


class _Names:
    """The names of a folder's files, in order, in one buffer. `before`: number of files in earlier folders."""

    __slots__ = ("_bytes", "_ends", "_order", "before")

    def __init__(self, names: list[str], *, before: int) -> None:
        self.before = before
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = array("Q", [0])
        self._order: array[int] | None = None  # indices of the names in folded order, built on demand
        for name in encoded:
            self._ends.append(self._ends[-1] + len(name))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return map(self._name, range(len(self)))

    def find(self, name: str) -> int | None:
        index = bisect_left(range(len(self)), name, key=self._name)
        return index if index < len(self) and self._name(index) == name else None

    def starting(self, prefix: str) -> Iterator[str]:
        for index in range(bisect_left(range(len(self)), prefix, key=self._name), len(self)):
            if not (name := self._name(index)).startswith(prefix):
                return
            yield name

    def starting_alike(self, prefix: str) -> Iterator[str]:
        if self._order is None:
            self._order = array("I", sorted(range(len(self)), key=lambda index: folded(self._name(index))))
        wanted = folded(prefix)
        for at in range(bisect_left(self._order, wanted, key=lambda index: folded(self._name(index))), len(self)):
            if not folded(name := self._name(self._order[at])).startswith(wanted):
                return
            yield name

    def _name(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


def folded(name: str) -> str:
    """A name without case and in composed Unicode form, for comparison."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name.casefold())
