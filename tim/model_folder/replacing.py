"""Write a folder atomically: complete, or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """A new, empty folder for the block to fill, which takes the place of `folder` when the block ends.

    All files are on the disk before the older folder is moved away. If the block raises, the older folder stays, and nothing is left of the
    new one. Raises OSError.
    """
    folder = Path(folder).resolve()
    partial, older = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old.tmp"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        os.replace(folder, older)
    os.replace(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
