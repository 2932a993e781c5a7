"""Files that appear whole or not at all: temporary name on the same file system, fsync, rename."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
WORK, JOB, LOCK = ".work", "job.json", "lock"


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Write to the stream; the file takes its name when the block ends well, and nothing of it stays when it does not."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
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


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """OUT/.work, locked against a second run, with the litter of a killed run removed. Raises RuntimeError where another run writes."""
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"{out}: another run is writing here") from error
        for folder in (out, work):
            for litter in folder.glob(f"*{TEMPORARY_SUFFIX}"):
                litter.unlink()
        yield work


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
