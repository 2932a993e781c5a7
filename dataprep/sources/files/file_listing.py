"""The files below a folder, of which there may be many millions: held at a few bytes more than their names, and still found by name."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping


class Listing:
    """All files below a folder by their names in it, with forward slashes: those of a folder in order, then the folders in it in order.

    `folders`: each folder with files, as `a/b/` ("" for the root), and the sizes in bytes (None: unknown) of the files in it by name.
    `notes`: what else there is to say of the folder, in phrases.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, folders: Iterable[tuple[str, Mapping[str, int | None]]]) -> None:
        self._folders: dict[str, _Names] = {}
        self._alike: dict[str, list[str]] | None = None  # folders by their names without case
        self._digest = hashlib.sha256()
        for folder, sizes in folders:
            names = sorted(sizes)
            self._folders[folder] = _Names(names, before=len(self))
            for name in names:
                self._digest.update(f"{folder}{name}\0{sizes[name]}\n".encode("utf-8", "surrogateescape"))

    @classmethod
    def of_files(cls, sizes: Mapping[str, int | None]) -> Listing:
        """Of files by their whole names."""
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
        """Each folder with the names of the files in it, which may be gone through again."""
        yield from self._folders.items()

    def number(self, file: str) -> int | None:
        """The position of a file among all, None if there is no such file."""
        name = file.rpartition("/")[2]
        names = self._folders.get(file[: len(file) - len(name)])
        place = None if names is None else names.find(name)
        return None if names is None or place is None else names.before + place

    def starting(self, prefix: str, *, folds: bool = False) -> Iterator[str]:
        """The files of a folder whose names start with those letters; with `folds`, in any case and Unicode form."""
        name = prefix.rpartition("/")[2]
        folder = prefix[: len(prefix) - len(name)]
        names = self._folders.get(folder)
        if names is not None:
            yield from (folder + found for found in (names.starting_alike(name) if folds else names.starting(name)))

    def alike(self, file: str) -> list[str]:
        """The files whose names are the same but for case and Unicode form, in this folder and in those of a name alike."""
        if self._alike is None:
            self._alike = {}
            for folder in self._folders:
                self._alike.setdefault(folded(folder), []).append(folder)
        name = file.rpartition("/")[2]
        folders = self._alike.get(folded(file[: len(file) - len(name)]), [])
        wanted = folded(file)
        return [found for folder in folders for found in self.starting(folder + name, folds=True) if folded(found) == wanted]

    def digest(self) -> hashlib._Hash:
        """sha256 of all names and sizes, for others to add to."""
        return self._digest.copy()


class _Names:
    """The names of a folder's files in order, one behind the other; `before`: how many files the folders before it have."""

    __slots__ = ("_bytes", "_ends", "_order", "before")

    def __init__(self, names: list[str], *, before: int) -> None:
        self.before = before
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = array("Q", [0])
        self._order: array[int] | None = None  # the places of the names in the order of their folded forms, once it is asked for
        for name in encoded:
            self._ends.append(self._ends[-1] + len(name))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return map(self._name, range(len(self)))

    def find(self, name: str) -> int | None:
        place = bisect_left(range(len(self)), name, key=self._name)
        return place if place < len(self) and self._name(place) == name else None

    def starting(self, prefix: str) -> Iterator[str]:
        for place in range(bisect_left(range(len(self)), prefix, key=self._name), len(self)):
            if not (name := self._name(place)).startswith(prefix):
                return
            yield name

    def starting_alike(self, prefix: str) -> Iterator[str]:
        if self._order is None:
            self._order = array("I", sorted(range(len(self)), key=lambda place: folded(self._name(place))))
        wanted = folded(prefix)
        for at in range(bisect_left(self._order, wanted, key=lambda place: folded(self._name(place))), len(self)):
            if not folded(name := self._name(self._order[at])).startswith(wanted):
                return
            yield name

    def _name(self, place: int) -> str:
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogateescape")


def folded(name: str) -> str:
    """The same for names that differ only in case or in how Unicode composes their letters."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name.casefold())
