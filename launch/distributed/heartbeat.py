"""What each rank is doing, in one small file per rank that outlives it.

    RUN/ranks/rank-00003           one line of JSON: section, step, samples in hand, process, machine (`RankState`)
    RUN/ranks/rank-00003.stacks    Python stacks: on SIGUSR2, and when a native library crashes

A rank overwrites its file whenever it enters a section of the step, without lock or fsync: about ten microseconds. `tim launch` reads the
files to say what a dead rank was doing, and to find a rank that hangs (`launch.distributed.supervisor`).
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.errors import one_line
from pipeline.foreign_warnings import HIDDEN

FOLDER = "ranks"
LAUNCHER = "TIM_LAUNCHER_PID"  # environment variable of ranks that `tim launch` supervises
LOST_CONNECTION = 76  # exit code, only from a rank to `tim launch`: it failed because another rank is gone
SECTIONS = {
    "start": "starting",
    "data": "waiting for data",
    "compute": "in forward, backward and update",
    "collective": "waiting for the other ranks",
    "save": "saving",
    "validate": "measuring the validation loss",
    "preview": "drawing a preview",
}
DUMP_SIGNAL = signal.SIGUSR2
_FILE_BYTES = 4096
_KEY_CHARACTERS = 2400  # leaves room for escaped characters and the other fields
_ERROR_CHARACTERS = 400
_GLOO_ERRORS = ("third_party/gloo", "Connection closed by peer", "Connection reset by peer")


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank was doing when it last wrote. `since` is in seconds of Unix time; `keys` are sample ids, `more` how many are left out.

    `ended`: the training is over in this process; `error`: why it failed; `lost`: because the connection to another rank broke.
    """

    rank: int
    host: str
    pid: int
    attempt: int = 0
    section: str = "start"
    since: float = 0.0
    step: int = 0
    keys: tuple[str, ...] = ()
    more: int = 0
    ended: bool = False
    error: str = ""
    lost: bool = False


@dataclass(slots=True)
class Heartbeat:
    """This process's state. Without an open file it is only kept in memory."""

    state: RankState = field(default_factory=lambda: RankState(rank=0, host=socket.gethostname(), pid=os.getpid()))
    _file: int | None = None

    def section(self, name: str, *, step: int | None = None, keys: Sequence[str] = ()) -> None:
        """Enter a section (one of SECTIONS). step: the step in hand, from 1; keys: the samples in hand."""
        step = self.state.step if step is None else step
        shown = _first_keys(keys)
        self._write(replace(self.state, section=name, since=time.time(), step=step, keys=shown, more=len(keys) - len(shown)))

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Mark a collective operation within a section."""
        before = self.state
        self._write(replace(before, section="collective", since=time.time()))
        yield  # an error leaves the section as it is
        self._write(replace(before, since=time.time()))

    @contextmanager
    def opened(self, run_dir: Path, *, rank: int) -> Iterator[None]:
        """Write to the rank's file in RUN/ranks until the end, and record there how the training ended."""
        path = state_path(run_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._write(RankState(rank=rank, host=socket.gethostname(), pid=os.getpid(), attempt=attempt, since=time.time()))
        try:
            with _stacks_on_signal(path.with_suffix(".stacks")):
                try:
                    yield
                except BaseException as error:
                    reason = "" if isinstance(error, SystemExit) else _reason(error)
                    self._write(replace(self.state, since=time.time(), ended=True, error=reason, lost=is_connection_error(error)))
                    raise
                self._write(replace(self.state, since=time.time(), ended=True))
        finally:
            os.close(self._file)
            self._file = None

    def _write(self, state: RankState) -> None:
        self.state = state
        if self._file is not None:
            text = json.dumps({name: getattr(state, name) for name in RankState.__dataclass_fields__})
            os.pwrite(self._file, text.encode().ljust(_FILE_BYTES), 0)


HEARTBEAT = Heartbeat()


@contextmanager
def quiet_if_connection_lost() -> Iterator[None]:
    """Under `tim launch`, exit without a message if another rank's death broke the connection: the launcher reports that rank.

    With `--debug` every rank shows its traceback.
    """
    try:
        yield
    except Exception as error:
        if LAUNCHER in os.environ and HIDDEN in os.environ and is_connection_error(error):
            raise SystemExit(LOST_CONNECTION) from None
        raise


def is_connection_error(error: BaseException) -> bool:
    """Whether an error began with a broken connection to another rank."""
    import torch.distributed as dist

    while error.__context__ is not None:  # errors of the clean-up come on top
        error = error.__context__
    if isinstance(error, dist.DistError):  # of NCCL and of the store
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _GLOO_ERRORS)


def remove_states(run_dir: Path) -> None:
    """Remove the files of an earlier job. Requires the run's lock."""
    for path in (run_dir / FOLDER).glob("rank-*"):
        path.unlink(missing_ok=True)


def state_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank-{rank:05d}"


def stacks_path(run_dir: Path, rank: int) -> Path:
    """File that the rank's faulthandler writes to."""
    return state_path(run_dir, rank).with_suffix(".stacks")


def read_state(path: Path) -> RankState | None:
    """State in a rank's file; None if there is none. A file that is being overwritten is read again."""
    for _ in range(5):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        with suppress(ValueError, TypeError, KeyError):
            content = json.loads(text)
            return RankState(**{**content, "keys": tuple(content["keys"])})
        if not text:
            return None
        time.sleep(0.002)
    return None


@contextmanager
def _stacks_on_signal(path: Path) -> Iterator[None]:
    """Write the Python stacks of all threads to a file on DUMP_SIGNAL, and on a crash unless another file is set for crashes."""
    with path.open("w") as file:
        own_crashes = not faulthandler.is_enabled()
        if own_crashes:
            faulthandler.enable(file)
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
            if own_crashes:
                faulthandler.disable()


def _reason(error: BaseException) -> str:
    """The error in one line, without gloo's source file and general advice."""
    text = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", one_line(error, limit=_ERROR_CHARACTERS))
    return text.partition(". This is typically")[0]


def _first_keys(keys: Sequence[str]) -> tuple[str, ...]:
    """Keys that fit into the file."""
    shown, room = [], _KEY_CHARACTERS
    for key in keys:
        room -= len(json.dumps(key)) + 2
        if room < 0:
            break
        shown.append(key)
    return tuple(shown)
