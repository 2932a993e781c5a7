"""A pool of local worker processes that keeps order, bounds its queue and survives the death of a worker.

Each worker is a fresh interpreter (no fork of a process that may hold threads or a GPU, no second run of the user's script) that reads
pickled tasks from its parent and answers over a pipe. A picture that takes its decoder down costs one worker, never the run.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int], None]
# What a task function is given: its task, and a function to tell which item of the task it is about to work on.
Work = Callable[[Task, Report], Result]

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


class WorkerDied(RuntimeError):
    """A worker process ended without an answer; `at` is the item that it last reported (-1 if none)."""

    def __init__(self, message: str, *, at: int) -> None:
        super().__init__(message)
        self.at = at


class LocalPool:
    """`workers` processes, started when first needed. Use as a context manager: leaving it ends them."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: give 1 or more")
        self._workers = workers
        self._own = threading.local()
        self._lock = threading.Lock()
        self._started: list[_Worker] = []
        self._is_open = True
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._is_open = False
        for worker in self._started:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._started:
            worker.close()

    def map(
        self,
        work: Work[Task, Result],
        tasks: Iterable[Task],
        *,
        retry: Callable[[Task, WorkerDied], Task] | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> Iterator[Result]:
        """Results in the order of the tasks, of which never more than a few are drawn ahead.

        work: a module-level function. retry: after a worker's death, the task to give to a new worker (it raises to give up); without it
        the death is raised. on_items: called in the caller's thread, now and then, with the number of items reported so far.
        """
        counter = _Counter()

        def run(task: Task) -> Result:
            outcome = self._attempt(work, task, report=counter.add)
            while isinstance(outcome, WorkerDied):
                if retry is None:
                    raise outcome
                task = retry(task, outcome)
                outcome = self._attempt(work, task, report=counter.add)
            return outcome

        remaining = iter(tasks)
        waiting = deque(self._threads.submit(run, task) for task in islice(remaining, 2 * self._workers))
        while waiting:
            first = waiting.popleft()
            while not wait([first], timeout=_POLL_SECONDS).done:
                if on_items:
                    on_items(counter.value)
            waiting.extend(self._threads.submit(run, task) for task in islice(remaining, 1))
            yield first.result()

    def _attempt(self, work: Work[Task, Result], task: Task, *, report: Report) -> Result | WorkerDied:
        try:
            return self._worker().run(work, task, report=report)
        except WorkerDied as death:
            return death

    def _worker(self) -> _Worker:
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive():
            with self._lock:
                if not self._is_open:
                    raise RuntimeError("the pool is closed")
                worker = self._own.worker = _Worker()
                self._started.append(worker)
        return worker


class _Counter:
    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, _: int) -> None:
        with self._lock:
            self.value += 1


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self) -> None:
        start = f"import sys; sys.path[:] = {sys.path!r}; from dataprep.executor import serve; serve({os.getpid()})"
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread}
        )

    def run(self, work: Callable[..., Any], task: Any, *, report: Report) -> Any:
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
            code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise WorkerDied(f"a worker process died ({how})", at=at) from error
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


def serve(parent: int) -> None:
    """The worker's end: answer tasks until the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers

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
