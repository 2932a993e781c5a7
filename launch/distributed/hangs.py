"""Find the rank that keeps the others waiting, from the sections that all ranks are in."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.distributed.failures import describe_work
from launch.distributed.heartbeat import RankState

HOST = socket.gethostname()
_WAITING = re.compile(r"torch/distributed/|deepspeed/comm/")  # files of the innermost frames of a rank that waits for others
_INNERMOST = 8  # frames
NOT_RUNNING = "TtDZX"  # process states: stopped, traced, in uninterruptible sleep, dead
STOPPED = {
    "T": ", its process is stopped (SIGSTOP)",
    "t": ", its process is stopped (by a debugger)",
    "D": ", its process waits for a disk, the network or a device and cannot be interrupted",
}  # by process state


@dataclass(slots=True)
class Ages:
    """How long each rank has been in its section, by this process's clock: clocks of other machines and clock changes do not matter."""

    _seen: dict[int, tuple[tuple[object, ...], float]] = field(default_factory=dict)

    def age(self, state: RankState) -> float:
        """Seconds since this object first saw this section of the rank."""
        entry = (state.pid, state.attempt, state.section, state.step, state.since, state.ended)
        known, first = self._seen.get(state.rank, (None, 0.0))
        if known != entry:
            first = time.monotonic()
            self._seen[state.rank] = (entry, first)
        return time.monotonic() - first


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A section is over its limit. suspects: ranks that may be the cause, longest in their section first; everyone if all ranks wait."""

    limit: float
    suspects: tuple[RankState, ...]


def find_hang(states: Iterable[tuple[RankState, float]], limits: Mapping[str, float]) -> Suspicion | None:
    """Compare states and their ages in seconds with the limits by section (0: none).

    A rank that waits in a collective operation is only over its limit if all ranks do: else the limit of the one that it waits for counts.
    """
    ordered = sorted(states, key=lambda entry: -entry[1])
    busy = [(state, age) for state, age in ordered if not _waits(state)]
    waiting = [(state, age) for state, age in ordered if _waits(state)]
    for state, age in busy:
        if 0 < limits[state.section] < age:
            return Suspicion(limits[state.section], tuple(state for state, _ in busy))
    limit = limits["collective"]
    if not busy and waiting and 0 < limit < waiting[-1][1]:
        return Suspicion(limit, tuple(state for state, _ in waiting))
    return None


def blame(suspects: Sequence[RankState], stacks: Mapping[int, str]) -> RankState | None:
    """The suspect that hangs: one that is stopped, else the first whose stack is not inside a collective operation; None if all are.

    stacks: Python stacks of the ranks of this machine. Ranks of other machines, whose stacks are not known, come last.
    """
    stopped = [state for state in suspects if process_state(state) in NOT_RUNNING]
    if stopped:
        return stopped[0]
    known = [state for state in suspects if state.rank in stacks and not is_waiting(stacks[state.rank])]
    unknown = [state for state in suspects if state.rank not in stacks]
    return next((state for state in (*known, *unknown) if not _waits(state)), None)


def describe_hang(found: Suspicion, state: RankState | None, folder: Path) -> list[str]:
    """Lines for people. state: the rank to blame; folder: stacks of the ranks."""
    limit = f"for more than {found.limit:g} s (train.hang_timeout)"
    stacks = f"  Python stacks of the ranks of this machine: {folder}"
    if state is not None:
        return [f"rank {state.rank} on {state.host} hangs {limit}{STOPPED.get(process_state(state), '')}: {describe_work(state)}", stacks]
    longest = found.suspects[0]
    return [
        f"all ranks wait for each other {limit}, rank {longest.rank} on {longest.host} the longest: {describe_work(longest)}",
        "  ranks disagree on the next collective operation, or the network is broken: compare their stacks",
        stacks,
    ]


def is_waiting(stacks: str) -> bool:
    """Whether a thread of a rank is inside a collective operation, according to a dump of py-spy or faulthandler."""
    for thread in re.split(r"^(?=(?:Current thread|Thread) )", stacks, flags=re.MULTILINE):
        if any(_WAITING.search(line) for line in thread.splitlines()[: 1 + _INNERMOST]):
            return True
    return False


def process_state(state: RankState) -> str:
    """Letter of the process state of a rank (`man proc`): "T" if stopped, "?" if unknown or on another machine."""
    if state.host != HOST:
        return "?"
    try:
        return Path(f"/proc/{state.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _waits(state: RankState) -> bool:
    return state.ended or state.section == "collective"
