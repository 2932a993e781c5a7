"""Python stacks of hanging ranks, written into the run folder.

py-spy reads a process from outside, also one that is stopped or holds the interpreter's lock. Where it is not installed or not allowed to
read the process, the rank is asked by a signal to write its own (`faulthandler`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from launch.distributed.heartbeat import DUMP_SIGNAL, RankState, stacks_path
from pipeline.storage.atomic import publish_text

FOLDER = "stacks"
_NCCL_PREFIX = "nccl-rank-"
_SECONDS = 10.0  # for one dump


def write_stacks(run_dir: Path, states: Iterable[RankState], *, nccl: Path | None) -> tuple[Path, dict[int, str]]:
    """Write RUN/stacks/TIME/rank-00003.txt for each of the given ranks of this machine. Returns the folder, and the stacks by rank.

    nccl: folder given to `nccl_environment`, for NCCL's flight recorder.
    """
    folder = run_dir / FOLDER / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    stacks = {state.rank: _py_spy(state.pid) or _faulthandler(run_dir, state) for state in states}
    for rank, text in stacks.items():
        reason = "no stacks: py-spy is not installed or may not read this process, and the process did not answer a signal\n"
        publish_text(folder / f"rank-{rank:05d}.txt", text or reason)
    if nccl is not None:
        _collect_nccl(nccl, folder)
    return folder, {rank: text for rank, text in stacks.items() if text}


def nccl_environment(folder: Path) -> dict[str, str]:
    """Environment that makes NCCL record its last collectives, and write them to `folder` on request and on a timeout."""
    return {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # entries
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / _NCCL_PREFIX),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(folder / "pipe-rank-"),
    }


def _py_spy(pid: int) -> str:
    """Stacks by py-spy; "" where it fails."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    command = [program, "dump", "--nonblocking", "--full-filenames", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _faulthandler(run_dir: Path, state: RankState) -> str:
    """Stacks written by the rank itself; "" if it does not answer, e.g. because it is stopped or has not opened its file yet."""
    path = stacks_path(run_dir, state.rank)
    try:
        before = path.stat().st_size
        os.kill(state.pid, DUMP_SIGNAL)
    except OSError:
        return ""
    text, deadline = "", time.monotonic() + 2.0
    while time.monotonic() < deadline:
        time.sleep(0.1)
        newest = path.read_text(encoding="utf-8", errors="replace")[before:]
        if newest and newest == text:
            break
        text = newest
    return text


def _collect_nccl(source: Path, folder: Path) -> None:
    """Ask the ranks of this machine for NCCL's flight recorder, and move what they write."""
    pipes = list(source.glob("pipe-rank-*"))
    for pipe in pipes:
        with suppress(OSError):
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(descriptor, b"1\n")
            os.close(descriptor)
    deadline = time.monotonic() + (5.0 if pipes else 0.0)
    while len(list(source.glob(f"{_NCCL_PREFIX}*"))) < len(pipes) and time.monotonic() < deadline:
        time.sleep(0.2)
    for written in source.glob(f"{_NCCL_PREFIX}*"):
        shutil.move(written, folder / written.name)
