"""Walk the visible files below a local folder, including linked folders. Each folder is visited once."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from pipeline.corpus.record_fields import IMAGE_EXTENSIONS

_NOTES = {
    "followed": "link(s) to folders were followed",
    "again": "link(s) to folders that are part of the source already were not followed",
    "above": "link(s) to folders above the source were not followed",
    "broken": "broken link(s) were left out",
    "unreadable": "file(s) or folder(s) cannot be read and were left out",
    "special": "pipe(s), socket(s) or device(s) were left out",
    "hidden": "hidden image(s) were left out",
}


class Walk:
    """One walk over a folder. Linked folders come after the folder's own content, in order of their names.

    `notes()` is complete once all folders have been read.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._visited: set[tuple[int, int]] = set()
        self._links: deque[str] = deque()
        self._counts: Counter[str] = Counter()

    def folders(self) -> Iterator[tuple[str, dict[str, int | None]]]:
        """Each folder with files, as `a/b/` ("" for the root), and the sizes of its files by name. Raises OSError."""
        top = Path(self._root).resolve()
        self._visited.add(_identity(top))
        above = {_identity(parent) for parent in top.parents}
        yield from self._tree(self._root)
        while self._links:
            link = self._links.popleft()
            try:
                target = _identity(link)
            except OSError:
                self._counts["unreadable"] += 1
                continue
            if target in self._visited or target in above:
                self._counts["again" if target in self._visited else "above"] += 1
                continue
            self._visited.add(target)
            self._counts["followed"] += 1
            yield from self._tree(link)

    def notes(self) -> list[str]:
        """Phrases on links, hidden files and unreadable entries."""
        return [f"{self._counts[kind]} {note}" for kind, note in _NOTES.items() if self._counts[kind]]

    def _tree(self, start: str) -> Iterator[tuple[str, dict[str, int | None]]]:
        for folder, folders, names in os.walk(start, onerror=self._count_unreadable):
            folders[:] = [name for name in sorted(folders) if not is_hidden(name) and self._enters(os.path.join(folder, name))]
            sizes = {name: size for name in names if (size := self._size(folder, name)) is not None}
            if sizes:
                inner = os.path.relpath(folder, self._root)
                yield "" if inner == os.curdir else f"{inner}/", dict(sizes)

    def _enters(self, path: str) -> bool:
        """Whether to read a folder now. Links are queued until all real folders have been read."""
        if os.path.islink(path):
            self._links.append(path)
            return False
        try:
            identity = _identity(path)
        except OSError:
            self._counts["unreadable"] += 1
            return False
        is_new = identity not in self._visited
        self._visited.add(identity)
        return is_new

    def _size(self, folder: str, name: str) -> int | None:
        path = os.path.join(folder, name)
        if is_hidden(name):
            self._counts["hidden"] += is_hidden_image(name)
            return None
        try:
            found = os.stat(path)
        except OSError:
            self._counts["broken" if os.path.islink(path) else "unreadable"] += 1
            return None
        if not stat.S_ISREG(found.st_mode):
            self._counts["special"] += 1
            return None
        return found.st_size

    def _count_unreadable(self, error: OSError) -> None:
        if error.filename == self._root:
            raise error
        self._counts["unreadable"] += 1


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def is_hidden_image(name: str) -> bool:
    """Whether a hidden file looks like an image: `.a.jpg`, but not macOS's `._a.jpg`, which holds attributes of a.jpg."""
    return not name.startswith("._") and name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and name.count(".") > 1


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
