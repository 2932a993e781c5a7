"""Atomic file writes: temporary name on the same file system, fsync, rename. Locked work folders."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
WORK, JOB, LOCK = ".work", "job.json", "lock"


@contextmanager
def publish(path: Path, *, is_private: bool = False) -> Iterator[BinaryIO]:
    """Write a file atomically: it appears when the block succeeds, and is removed when it raises. Only its owner can read a private one.

    An OSError of the block or of the file system, such as a full disk, names the file.
    """
    temporary = path.with_name(f"{path.name}.{process_name()}{TEMPORARY_SUFFIX}")
    mode = 0o600 if is_private else 0o666  # less the umask
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            error.filename = str(path)
        raise
    fsync_path(path.parent)


def publish_text(path: Path, text: str, *, is_private: bool = False) -> None:
    """Write a text file atomically, in UTF-8."""
    with publish(path, is_private=is_private) as stream:
        stream.write(text.encode("utf-8"))


def process_name() -> str:
    """A name unique to this process over all machines that share the file system."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def exclusive_lock(out: Path) -> Iterator[Path]:
    """Lock OUT/.work and remove temporary files of a killed run there and in OUT. Raises RuntimeError if another run has the lock."""
    with locked_work_folder(out / WORK, place=str(out), folder=out) as work:
        yield work


@contextmanager
def locked_work_folder(work: Path, *, place: str, folder: Path | None, part: str = "") -> Iterator[Path]:
    """Lock a work folder for `place`, and remove temporary files of a killed run from it and from `folder`.

    Several `part`s of different names may run at once, but no other run. Raises RuntimeError if another run has the lock.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock, open(work / f"{LOCK}-{part}", "w") if part else nullcontext() as part_lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if part else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if part_lock:
                fcntl.flock(part_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{place}: another run is writing here") from error
        folders = [] if part else [work, *([folder] if folder else [])]
        try:
            remove_temporary_files(folders)
            yield work
        finally:
            remove_temporary_files(folders)


def remove_temporary_files(folders: Sequence[Path]) -> None:
    """Remove files that `publish` left behind in a process that was killed. Only for the one process that writes there."""
    for folder in folders:
        for file in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            if not file.is_dir():  # a folder that was being written is removed when it is written again
                file.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Flush a file or folder to its disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
