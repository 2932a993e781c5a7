"""Find ranks that hang without `tim launch`: a thread in each rank, under plain torchrun, Slurm, or in a single process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.distributed.hangs import HOST, NOT_RUNNING, Ages, blame, describe_hang, find_hang, process_state
from launch.distributed.heartbeat import FOLDER, HEARTBEAT, LAUNCHER, RankState, read_state
from launch.distributed.stacks import write_stacks
from launch.distributed.supervisor import SECONDS_BETWEEN_CHECKS, say


@contextmanager
def watched(run_dir: Path, *, limits: Mapping[str, float]) -> Iterator[None]:
    """Watch the ranks of this machine until the end of the context; no-op under `tim launch`, which does it from outside."""
    if LAUNCHER in os.environ or not any(limits.values()):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(run_dir, limits, done), name="hang-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(run_dir: Path, limits: Mapping[str, float], done: threading.Event) -> None:
    """Of the ranks of this machine, the first whose process runs reports a hang, and ends all of them."""
    own, ages, started = HEARTBEAT.state, Ages(), time.time()
    while not done.wait(SECONDS_BETWEEN_CHECKS):
        states = _states(run_dir, attempt=own.attempt, started=started)
        found = find_hang([(state, ages.age(state)) for state in states], limits)
        local = [state for state in states if state.host == HOST]
        running = [state.rank for state in local if process_state(state) not in NOT_RUNNING]
        if found is None or own.rank != min(running, default=own.rank) or not any(state in local for state in found.suspects):
            continue
        folder, stacks = write_stacks(run_dir, local, nccl=None)
        for line in describe_hang(found, blame(found.suspects, stacks), folder):
            say(line)
        for state in local:
            if state.pid != os.getpid():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(state.pid, signal.SIGKILL)
        os._exit(1)


def _states(run_dir: Path, *, attempt: int, started: float) -> list[RankState]:
    """States of the living ranks of this machine, and of those of other machines that have written in this attempt."""
    states = [state for path in sorted((run_dir / FOLDER).glob("rank-?????")) if (state := read_state(path)) is not None]
    return [
        state
        for state in states
        if (process_state(state) != "?" if state.host == HOST else state.attempt == attempt and state.since > started - 600)
    ]
