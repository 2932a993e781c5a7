"""Write a folder atomically: complete, or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FolderInUseError(ValueError):
    """Another process is writing the folder."""


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """A new, empty folder for the block to fill, which takes the place of `folder` when the block ends.

    All files are on the disk before the older folder is moved away. If the block raises, the older folder stays, and nothing is left of the
    new one. Raises FolderInUseError if another process is in such a block, and OSError.
    """
    folder = Path(folder).resolve()
    partial, older = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old.tmp"))
    with _own_folder(partial, folder=folder):
        if older.exists() and not folder.exists():  # a process was killed between the two moves below
            os.replace(older, folder)
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


@contextmanager
def _own_folder(partial: Path, *, folder: Path) -> Iterator[None]:
    """An empty folder, locked while the block runs. The lock ends with its process; what a killed one left is removed."""
    descriptor = -1
    while descriptor < 0:
        partial.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its process renamed it meanwhile
            descriptor = _locked(partial, folder=folder)
    try:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        os.close(descriptor)


def _locked(partial: Path, *, folder: Path) -> int:
    """A descriptor of the folder, which holds its lock. Raises FolderInUseError, and FileNotFoundError if the folder is gone."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FolderInUseError(f"{folder}: another process is writing it: wait until it ends, or give another folder") from None
    except OSError:  # a file system without such locks
        return descriptor
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    raise FileNotFoundError(partial)


def _sync(path: Path) -> None:
    """Flush a file or folder to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
