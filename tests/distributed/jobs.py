"""Real training jobs for tests: started as a user starts them, watched through what they write."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launch.distributed.heartbeat import RankState, read_state, state_path
from launch.training.metrics import read_rows
from tests import REPOSITORY
from tests.processes import is_running

PATIENCE = 200.0  # seconds
# What a training says of itself on standard error, and `tim launch` on standard output.
_OWN_LINE = re.compile(
    r"starting: .*, \d+ s$|\d+\.\d+M parameters · \d+ process|step \d+/\d+ · (loss |the first one took )"
    r"|saved \S+$|model: \S+$|\S+: trained for \d+ steps?$"
)


_launched: list[subprocess.Popen[bytes]] = []


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """`tim ARGUMENTS…` in the background, its output in a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    with log.open("ab") as output:
        job = subprocess.Popen([sys.executable, "-m", "launch.cli", *arguments], env=environment, stdout=output, stderr=output)
    _launched.append(job)
    return job


def run_ranks(module: str, *arguments: str, log: Path, ranks: int = 2) -> None:
    """Run `python -m MODULE ARGUMENTS…` to its end; fail with what the ranks said where that fails."""
    assert exit_codes(module, *arguments, log=log, ranks=ranks) == [0] * ranks, log.read_text()


def exit_codes(module: str, *arguments: str, log: Path, ranks: int = 2) -> list[int]:
    """Run `python -m MODULE ARGUMENTS…` to its end; the exit code of each rank, -9 if another one failed first."""
    start_ranks(module, *arguments, log=log, ranks=ranks)
    return _rank_server().exit_codes()


def start_ranks(module: str, *arguments: str, log: Path, ranks: int = 2) -> RankProcesses:
    """`python -m MODULE ARGUMENTS…` in the background, one job at a time."""
    return RankProcesses(pids=_rank_server().start(module=module, arguments=arguments, log=str(log), ranks=ranks))


def kill_running() -> None:
    """Kill what a failed test has left behind: the tests after it would wait for it."""
    for job in _launched:
        if job.poll() is None:
            for pid in [job.pid, *workers_of(job.pid)]:
                os.kill(pid, signal.SIGKILL)
            job.wait()
    _launched.clear()
    if _rank_server.cache_info().currsize and _rank_server().busy:
        _rank_server().kill()
        _rank_server.cache_clear()


@dataclass(frozen=True)
class RankProcesses:
    """The ranks of a job of the rank server."""

    pids: list[int]

    def poll(self) -> int | None:
        """None while all of them live."""
        return None if all(map(is_running, self.pids)) else -1

    def kill(self, pids: Sequence[int] | None = None) -> None:
        """Kill all of them with -9, or only some: then the server kills the others as soon as it notices."""
        for pid in self.pids if pids is None else pids:
            os.kill(pid, signal.SIGKILL)
        assert _rank_server().exit_codes() == [-signal.SIGKILL] * len(self.pids)


class _RankServer:
    """The process that forks ranks, in a session of its own with them."""

    busy = False

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rank_server"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, **job: object) -> list[int]:
        """Start a job; the pids of its ranks."""
        assert self.process.stdin is not None
        self.busy = True
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def exit_codes(self) -> list[int]:
        """Wait for the end of the job; the exit codes of its ranks."""
        codes = self._answer()
        self.busy = False
        return codes

    def kill(self) -> None:
        """Kill the server and its ranks."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answer(self) -> list[int]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "[]")


@cache
def _rank_server() -> _RankServer:
    return _RankServer()


def wait_for_row(run_dir: Path, step: int, job: subprocess.Popen[bytes] | RankProcesses, *, log: Path, patience: float = PATIENCE) -> None:
    """Wait until the run has logged a step; fail where it ends before."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_rows(run_dir / "metrics.jsonl")):
            return
        assert job.poll() is None, f"ended with {job.poll()}: {log.read_text()}"
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {patience} s: {log.read_text()}")


def wait_for_line(pattern: str, job: subprocess.Popen[bytes] | RankProcesses, *, log: Path) -> re.Match[str]:
    """Wait until the log has a line with the pattern, and return its match; fail where the job ends before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found
        assert job.poll() is None, f"ended with {job.poll()}: {log.read_text()}"
        time.sleep(0.02)
    raise AssertionError(f"no line {pattern} in {PATIENCE} s: {log.read_text()}")


def wait_for_rank(run_dir: Path, *, after: int, attempt: int = 0, job: subprocess.Popen[bytes], log: Path) -> RankState:
    """Wait until rank 1 computes a step later than `after`; its state then. Fail where the job ends before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        state = read_state(state_path(run_dir, 1))
        if state is not None and state.attempt == attempt and state.step > after and state.section == "compute":
            return state
        assert job.poll() is None, f"ended with {job.poll()}: {log.read_text()}"
        time.sleep(0.005)
    raise AssertionError(f"rank 1 is not beyond step {after}: {log.read_text()}")


def workers_of(launcher: int) -> list[int]:
    """Processes that a launcher has started, and theirs: known by what it puts into their environment."""
    mark = f"TIM_LAUNCHER_PID={launcher}".encode()
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _environment(path)]


def kill_and_watch(job: subprocess.Popen[bytes], *, seconds: float = 30.0) -> list[int]:
    """Kill a launcher with -9; the processes of its that are still there after a while."""
    assert workers_of(job.pid), "the job has no workers yet"
    job.send_signal(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + seconds
    while (left := workers_of(job.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def story(run_dir: Path, *, columns: Sequence[str]) -> list[list[object]]:
    """What a run wrote of each step, without what depends on the clock."""
    return [[row[column] for column in columns] for row in read_rows(run_dir / "metrics.jsonl")]


def foreign_lines(output: str) -> list[str]:
    """The lines of a training's output that are not its own: warnings and notices of libraries."""
    return [line for line in output.splitlines() if not _OWN_LINE.match(line)]


def _environment(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
