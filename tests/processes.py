"""What becomes of the processes that a test starts."""

from __future__ import annotations

import os
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether a process runs. One that has ended but is not reaped does not: the first process of a container may never reap orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def group_runs(group: int) -> bool:
    """Whether a process of a process group runs."""
    return any(is_running(pid) and _group_of(pid) == group for pid in map(int, filter(str.isdigit, os.listdir("/proc"))))


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
