"""Watch the ranks of this machine for `tim launch`: report the one that dies or hangs, end the others, and decide on a restart."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.console import STOPPED
from launch.distributed.failures import SILENT, End, describe_end, describe_work, first_cause
from launch.distributed.hangs import Ages, Suspicion, blame, describe_hang, find_hang
from launch.distributed.heartbeat import FOLDER, RankState, read_state, state_path
from launch.distributed.stacks import write_stacks
from launch.logs.startup import STARTUP

GRACE_AFTER_KILL = 3.0  # seconds that the other ranks have to end by themselves after one was killed
GRACE_AFTER_EXIT = 30.0  # the same after one failed: it may be printing its error
GRACE_AFTER_STOP = 240.0  # the same after one has saved and stopped: rank 0 closes trackers and requeues the job
SECONDS_BETWEEN_CHECKS = 1.0
PAUSE = 3.0  # seconds in which the launchers of other machines can write their ranks' stacks, before those lose their connection
HEAD_START = 30.0  # seconds that the launcher of another machine has to end its hanging rank itself


@dataclass(slots=True)
class Supervisor:
    """State of one `tim launch`. Call `watch` often, and `conclude` once the ranks of an attempt have ended.

    Args:
        run_dir: where the ranks write what they are doing; None if they do not.
        limits: seconds a rank may spend in a section, by section; 0: no limit.
        nccl: folder for NCCL's flight recorder.
    """

    run_dir: Path | None
    limits: Mapping[str, float]
    max_restarts: int = 0
    nccl: Path | None = None
    stopping: bool = False  # a signal asked the job to stop
    exit_code: int = 0
    machines: int = 1

    _pids: dict[int, int] = field(default_factory=dict)
    _attempt: int = -1
    _started: float = 0.0  # Unix time
    _is_between: bool = True  # before the first attempt, or between two
    _ends: dict[int, End] = field(default_factory=dict)
    _failed_at: float | None = None
    _killed: set[int] = field(default_factory=set)  # ranks killed by the supervisor
    _hanging: bool = False
    _ages: Ages = field(default_factory=Ages)
    _checked_at: float = 0.0
    _suspected_at: float | None = None

    @property
    def waits_for_machines(self) -> bool:
        """Whether other machines must join before ranks start."""
        return self.machines > 1 and self._is_between

    def watch(self, pids: Mapping[int, int]) -> bool:
        """Look at the processes of this machine's ranks. Returns False once all have ended, which is soon after one has failed."""
        if self._pids != pids:
            self._begin(pids)
        self._note_ends()
        alive = self._pids.keys() - self._ends.keys()
        now = time.monotonic()
        if self.limits and self._failed_at is None and now - self._checked_at >= SECONDS_BETWEEN_CHECKS:
            self._checked_at = now
            self._check_for_hangs()
        if self._failed_at is None:
            return bool(alive)
        if alive and now - self._failed_at < self._grace():
            return True
        self._kill(alive)
        for rank in self._ends:  # what a killed rank has started
            _kill_group(self._pids[rank])
        return False

    def conclude(self) -> bool:
        """Report a failed attempt. Returns whether the ranks are to be started again."""
        ends = [end for rank, end in self._ends.items() if rank not in self._killed]
        if self._hanging:
            self.exit_code = 1
        else:
            cause = first_cause(ends)
            self.exit_code = cause.exit_code
            for line in describe_end(cause, run_dir=self.run_dir):
                say(line)
        if self.stopping or self.exit_code in SILENT or self._attempt >= self.max_restarts:
            return False
        self._is_between = True
        with_others = " together with the other machines" if self.machines > 1 else ""
        say(f"starting all ranks again{with_others} from {self._newest()} (restart {self._attempt + 1} of {self.max_restarts})")
        return True

    def _begin(self, pids: Mapping[int, int]) -> None:
        """A new attempt."""
        STARTUP.end()  # rank 0 goes on
        self._is_between = False
        self._pids, self._attempt, self._started = dict(pids), self._attempt + 1, time.time()
        self._ends, self._failed_at, self._killed, self._hanging = {}, None, set(), False
        self._ages, self._suspected_at = Ages(), None
        if self.stopping:  # the signal came between two attempts
            for pid in pids.values():
                os.kill(pid, signal.SIGTERM)

    def _note_ends(self) -> None:
        """Record new ends without collecting the processes, which torchrun does."""
        for rank, pid in self._pids.items():
            if rank in self._ends:
                continue
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # collected already
                continue
            if ended is not None:
                code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                self._ends[rank] = End(rank=rank, host=socket.gethostname(), code=code, state=self._local_state(rank))
                if code and self._failed_at is None:
                    self._failed_at = time.monotonic()

    def _grace(self) -> float:
        """Seconds from the first failure in which the other ranks may end by themselves."""
        codes = {end.code for end in self._ends.values() if end.code}
        if self._hanging:
            return 0.0
        if codes == {STOPPED}:
            return GRACE_AFTER_STOP
        is_killed = any(code < 0 for code in codes)
        return (
            GRACE_AFTER_KILL if is_killed or self.run_dir is None else GRACE_AFTER_EXIT
        )  # without a run folder ranks do not wait for each other

    def _check_for_hangs(self) -> None:
        found = find_hang([(state, self._ages.age(state)) for state in self._states()], self.limits)
        if found is None:
            self._suspected_at = None
            return
        now = time.monotonic()
        first = self._suspected_at is None
        self._suspected_at = self._suspected_at or now
        local = [state for state in found.suspects if state.rank in self._pids and state.pid == self._pids[state.rank]]
        if local or now - self._suspected_at > HEAD_START:
            self._end_hanging(found)
        elif first and self.run_dir is not None:
            folder, _ = write_stacks(self.run_dir, self._local_states(), nccl=self.nccl)
            say(f"waiting for a rank on {found.suspects[0].host} {describe_work(found.suspects[0])}; stacks: {folder}")

    def _end_hanging(self, found: Suspicion) -> None:
        """Report a hang, write the stacks, and kill the ranks of this machine."""
        assert self.run_dir is not None, "without it there are no states"
        folder, stacks = write_stacks(self.run_dir, self._local_states(), nccl=self.nccl)
        for line in describe_hang(found, blame(found.suspects, stacks), folder):
            say(line)
        if any(state.rank not in self._pids for state in self._states()):
            time.sleep(PAUSE)
        self._hanging, self._failed_at = True, time.monotonic()

    def _states(self) -> list[RankState]:
        """States of all ranks of the job that have not left. Ranks of other machines count once they have written in this attempt."""
        if self.run_dir is None:
            return []
        states = self._local_states()
        for path in sorted((self.run_dir / FOLDER).glob("rank-?????")):
            state = read_state(path)
            if state is not None and state.rank not in self._pids and state.attempt == self._attempt and state.since > self._started - 600:
                states.append(state)
        return states

    def _local_states(self) -> list[RankState]:
        """States of the living ranks of this machine."""
        ranks = [rank for rank in self._pids if rank not in self._ends]
        starting = {"host": socket.gethostname(), "attempt": self._attempt, "since": self._started}
        return [self._local_state(rank) or RankState(rank=rank, pid=self._pids[rank], **starting) for rank in ranks]

    def _local_state(self, rank: int) -> RankState | None:
        """State of a rank of this machine; None if it has not written yet."""
        state = None if self.run_dir is None else read_state(state_path(self.run_dir, rank))
        return state if state is not None and state.pid == self._pids[rank] else None

    def _kill(self, ranks: set[int]) -> None:
        for rank in ranks:
            self._killed.add(rank)
            _kill_group(self._pids[rank])

    def _newest(self) -> str:
        """The checkpoint to resume from, for people."""
        latest = None if self.run_dir is None else self.run_dir / "latest"
        if latest is None or not latest.is_file():
            return "the beginning: there is no checkpoint yet"
        return f"checkpoint {latest.read_text(encoding='utf-8').strip()}"


def say(line: str) -> None:
    """Print to standard error. On a terminal, leave a progress line that a killed rank has left, and show the cursor again."""
    print(f"\r\x1b[?25h\x1b[K{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def _kill_group(pid: int) -> None:
    """Kill a rank and its loader processes: torchrun makes each rank the leader of a process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
