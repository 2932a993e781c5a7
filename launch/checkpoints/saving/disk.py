"""Disk space of checkpoints: which of them are kept, and whether there is room for another one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from launch.checkpoints.checkpoint import CHECKPOINTS, LATEST, CheckpointError, remove, step_folders, step_of
from launch.checkpoints.run_folder import CONFIG, METRICS

MARGIN = 2 << 20  # bytes for JSON files, folders and blocks that are not full
RUN_FILES = (LATEST, METRICS, CONFIG)  # of a run that has begun
_FULL = (errno.ENOSPC, errno.EDQUOT)


def superfluous(run_dir: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Checkpoints beyond the newest `keep_last`, oldest first, without those of multiples of `keep_every`."""
    older = step_folders(run_dir)[:-keep_last]
    return [folder for folder in older if keep_every is None or step_of(folder) % keep_every]


def make_room(
    run_dir: Path, needed: int, *, keep_last: int, keep_every: int | None, may_remove: Callable[[Path], bool] = lambda _: True
) -> tuple[str | None, list[Path]]:
    """Make room for a checkpoint of `needed` bytes. Returns what is wrong if there is none, and the removed checkpoints.

    Removes checkpoints beyond `keep_last` first; then those that the new one replaces, if that is enough. The newest one is never removed.
    """
    removed: list[Path] = []
    free = free_bytes(run_dir / CHECKPOINTS)
    needed += MARGIN
    beyond = [folder for folder in superfluous(run_dir, keep_last=keep_last, keep_every=keep_every) if may_remove(folder)]
    replaced = [folder for folder in superfluous(run_dir, keep_last=max(1, keep_last - 1), keep_every=keep_every) if may_remove(folder)]
    for candidates, only_if_enough in ((beyond, False), (replaced, True)):
        left = [folder for folder in candidates if folder not in removed]
        if free is not None and only_if_enough and free + sum(map(_size, left)) < needed:
            continue
        for folder in left:
            if free is None or free >= needed:
                break
            remove(folder)
            removed.append(folder)
            free = free_bytes(run_dir / CHECKPOINTS)
    if free is None or free >= needed:
        return None, removed
    remedy = "free space there, or lower checkpoint.keep_last"
    return f"{run_dir / CHECKPOINTS} has {_readable(free)} free, a checkpoint needs {_readable(needed)}: {remedy}", removed


def free_bytes(folder: Path) -> int | None:
    """Free bytes of the file system of a folder; None if it does not report them."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize if facts.f_blocks else None


def describe(error: Exception, *, path: Path) -> str:
    """A failed write in one line: path, reason, name of the errno, and the remedy if the disk is full.

    `path` is used if the error names none. Safetensors and other libraries report the errno in their text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number is None:
        return f"{path}: {' '.join(str(error).split())}"
    named = error.filename if isinstance(error, OSError) and error.filename else path
    remedy = ": free space there, or lower checkpoint.keep_last" if number in _FULL else ""
    return f"{named}: {os.strerror(number)} ({errno.errorcode.get(number, number)}){remedy}"


def check_mounted(run_dir: Path) -> None:
    """Raise CheckpointError if a run has begun here, but its checkpoints are gone: it must not start again silently."""
    begun = [name for name in RUN_FILES if (run_dir / name).is_file()]
    checkpoints = run_dir / CHECKPOINTS
    is_missing = not checkpoints.is_dir()
    if not begun or not (is_missing or (LATEST in begun and not step_folders(run_dir))):
        return
    what = "is missing" if is_missing else f"is empty, but {run_dir / LATEST} names {(run_dir / LATEST).read_text('utf-8').strip()}"
    remedy = f"mount its disk; to start over, remove {run_dir} or give another run_dir"
    raise CheckpointError(f"{checkpoints} {what}, although the run has begun ({', '.join(begun)}): {remedy}")


def _size(folder: Path) -> int:
    """Bytes of a checkpoint; 0 if it is being removed."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return 0


def _readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
