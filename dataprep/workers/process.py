"""A worker process: a fresh interpreter that reads pickled tasks from its parent and answers over a pipe.

It is not forked, as the parent may hold threads or a GPU, and does not run the user's script again. Its crash affects no other process.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.foreign_warnings import hide_if_asked

Report = Callable[[int], None]
WORKER_MEMORY = 8 << 30
"""Default memory limit of a worker in bytes: three times the need of the largest image within the default limits."""

_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = 113  # exit code


class WorkerDied(RuntimeError):
    """A worker process ended without an answer. `at`: the last reported item, -1 if none."""

    def __init__(self, message: str, *, at: int) -> None:
        super().__init__(message)
        self.at = at


class LocalWorker:
    """The parent's end of one worker process, which ends when it needs more than `memory` bytes of data."""

    def __init__(self, *, memory: int = WORKER_MEMORY) -> None:
        start = f"import sys; sys.path[:] = {sys.path!r}; from dataprep.workers.process import serve; serve({os.getpid()}, memory={memory})"
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread}
        )

    def run(self, work: Callable[..., Any], task: Any, *, report: Report) -> Any:
        """Run `work` in the worker: its result or exception. `report` is called with every reported item. Raises WorkerDied."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        at, kind = -1, ""
        value: Any = None
        try:
            pickle.dump((work, task), self._process.stdin)
            self._process.stdin.flush()
            while kind not in ("error", "result"):
                kind, value = pickle.load(self._process.stdout)
                if kind == "item":
                    at = value
                    report(at)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.kill()
            raise WorkerDied(f"a worker process died ({_describe_exit(self._process.wait())})", at=at) from error
        if kind == "error":
            raise value
        return value

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def _describe_exit(code: int) -> str:
    if code == _OUT_OF_MEMORY:
        return "it needed more memory than a worker may take"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def serve(parent: int, *, memory: int) -> None:
    """The worker's end: answer tasks until the parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    hide_if_asked()
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent handles it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    while True:
        try:
            work, task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = work(task, lambda at: answer("item", at))
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except Exception as error:
            answer("error", _sendable(error))
        else:
            answer("result", result)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class that does not survive the pipe
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
