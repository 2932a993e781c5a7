"""Why a job ended: which rank was first, what it was doing, and what usually helps."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.distributed.heartbeat import LOST_CONNECTION, SECTIONS, RankState, stacks_path
from pipeline.workers.process import signal_name

MAX_KEYS = 8
SILENT = (2, 75, 130)  # exit codes that the rank itself has explained: wrong configuration, stopped by a signal, interrupted
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
REMEDIES = {
    signal.SIGKILL: "usually the kernel's out-of-memory killer (see `dmesg | grep -i oom`) or the scheduler: use fewer loader.workers, a "
    "smaller loader.prefetch, or request more memory",
    signal.SIGSEGV: "a native library crashed: check that the versions of torch, its CUDA libraries and the driver fit together",
    signal.SIGBUS: "usually /dev/shm is full: enlarge it (docker run --shm-size), or use fewer loader.workers; else a mapped file was cut",
    signal.SIGABRT: "a native library gave up, e.g. NCCL's watchdog: see its lines above, and run with NCCL_DEBUG=INFO",
    signal.SIGTERM: "sent before the rank could catch it, or by something that did not reach the launcher",
}
LOST = "another rank is gone, or the network is broken: see the output of the other machines; on GPUs, run with NCCL_DEBUG=INFO"


@dataclass(frozen=True, slots=True)
class End:
    """End of a rank's process. code: exit code, or minus the signal; state: what it was doing, if it had come far enough to write that."""

    rank: int
    host: str
    code: int
    state: RankState | None

    @property
    def lost(self) -> bool:
        """Whether it failed because another rank was gone."""
        return self.code == LOST_CONNECTION or (self.state is not None and self.state.lost)

    @property
    def exit_code(self) -> int:
        """Exit code of the job if this rank is the cause."""
        return 1 if self.code < 0 or self.code == LOST_CONNECTION else self.code


def first_cause(ends: Sequence[End]) -> End:
    """The end that explains the others, which are in order of time: a kill, else an error of its own, else the first.

    Ranks end within milliseconds of each other, because they wait for each other in every step: time alone does not tell.
    """
    failed = [end for end in ends if end.code]
    killed = [end for end in failed if end.code < 0]
    own = [end for end in failed if not end.lost]
    explained = [end for end in own if end.state is not None and end.state.error]
    return (killed or explained or own or failed)[0]


def describe_end(end: End, *, run_dir: Path | None) -> list[str]:
    """Lines for people: who, how, when, and what to do. Empty for exits that the rank itself has explained."""
    doing = describe_work(end.state)
    who = f"rank {end.rank} on {end.host}"
    if end.code < 0:
        number = -end.code
        lines = [f"{who} was killed by {signal_name(number)} {doing}"]
        lines += [f"  {REMEDIES[signal.Signals(number)]}"] * (number in REMEDIES)
        if run_dir is not None and number in CRASHES and _has_text(stacks := stacks_path(run_dir, end.rank)):
            lines.append(f"  its Python stacks: {stacks}")
        return lines
    if end.code == LOST_CONNECTION:
        reasons = [f"  {end.state.error}"] if end.state is not None and end.state.error else []
        return [f"{who} lost the connection to another rank {doing}", *reasons, f"  {LOST}"]
    if end.code in SILENT:
        return []
    if end.state is not None and end.state.error:
        return [f"{who} failed {doing}: its error is above"]
    return [] if end.code == 1 else [f"{who} ended with exit code {end.code} {doing}"]


def describe_work(state: RankState | None) -> str:
    """`describe_work(state)` → "in step 12, in forward, backward and update; samples in hand: photos/000000017"."""
    if state is None or (state.section == "start" and not state.step):
        return "while starting"
    text = f"in step {state.step}, {SECTIONS[state.section]}" if state.step else SECTIONS[state.section]
    if state.keys:
        more = state.more + len(state.keys) - MAX_KEYS
        text += f"; samples in hand: {', '.join(state.keys[:MAX_KEYS])}" + (f" and {more} more" if more > 0 else "")
    return text


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
