"""Files that appear whole or not at all: temporary name on the same file system, fsync, rename."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
WORK, JOB, LOCK = ".work", "job.json", "lock"


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Write to the stream; the file takes its name when the block ends well, and nothing of it stays when it does not."""
    temporary = path.with_name(f"{path.name}.{process_name()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def publish_text(path: Path, text: str) -> None:
    with publish(path) as stream:
        stream.write(text.encode("utf-8"))


def process_name() -> str:
    """A name that no other process has, on any machine that shares a file system with this one."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def exclusive_lock(out: Path) -> Iterator[Path]:
    """OUT/.work, locked against a second run, without the litter of a killed run there and in OUT. Raises RuntimeError where another run
    writes."""
    with locked_work_folder(out / WORK, place=str(out), folder=out) as work:
        yield work


@contextmanager
def locked_work_folder(work: Path, *, place: str, folder: Path | None, part: str = "") -> Iterator[Path]:
    """A folder for unfinished work on `place`, locked against a second run; litter of a killed run is removed from it and from `folder`.

    Any number of `part`s of different names may work at once, and nobody else meanwhile. Raises RuntimeError where another run writes.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock, open(work / f"{LOCK}-{part}", "w") if part else nullcontext() as own:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if part else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if own:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{place}: another run is writing here") from error
        folders = [] if part else [work, *([folder] if folder else [])]
        try:
            _sweep(folders)
            yield work
        finally:
            _sweep(folders)


def _sweep(folders: list[Path]) -> None:
    for folder in folders:
        for litter in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            litter.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
