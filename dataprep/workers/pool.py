"""A worker pool with ordered results, a bounded queue and crash recovery: an image that crashes its decoder costs one worker, not the run.

Workers are processes on this machine, or on a Ray cluster (`dataprep.workers.ray_pool`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, TypeVar

from dataprep.workers.process import WORKER_MEMORY, LocalWorker, Report, WorkerDied

__all__ = ["LocalPool", "Pool", "Worker", "WorkerDied"]

Task = TypeVar("Task")
Result = TypeVar("Result")
# A task function gets its task, and a function to call with each item of the task before it works on it.
Work = Callable[[Task, Report], Result]

_POLL_SECONDS = 0.2
_ATTEMPTS = 3  # for a task whose workers die at no reported item


class Worker(Protocol):
    """One worker, local or not; see `LocalWorker`."""

    def run(self, work: Callable[..., Any], task: Any, *, report: Report) -> Any: ...

    def is_alive(self) -> bool: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Pool:
    """`workers` workers, made by `start` at first use. Use as a context manager, which ends them."""

    def __init__(self, workers: int, *, start: Callable[[], Worker]) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: give 1 or more")
        self._workers = workers
        self._start = start
        self._own = threading.local()
        self._lock = threading.Lock()
        self._started: list[Worker] = []
        self._is_open = True
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> Pool:
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
        """Results in task order; only a few tasks are taken ahead.

        work: a module-level function. retry: after a worker died at an item, returns the task for a new worker, or raises to give up.
        Without it, or if the worker died before it reported an item, the task is tried three times; then WorkerDied is raised. on_items:
        called in the caller's thread, from time to time, with the number of items reported so far.
        """
        counter = _Counter()

        def run(task: Task) -> Result:
            failures = 0
            outcome = self._attempt(work, task, report=counter.add)
            while isinstance(outcome, WorkerDied):
                if retry is not None and outcome.at >= 0:
                    task = retry(task, outcome)
                else:
                    failures += 1
                    if failures == _ATTEMPTS:
                        raise outcome
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

    def _worker(self) -> Worker:
        worker: Worker | None = getattr(self._own, "worker", None)
        if worker is None or not worker.is_alive():
            with self._lock:
                if not self._is_open:
                    raise RuntimeError("the pool is closed")
                worker = self._own.worker = self._start()
                self._started.append(worker)
        return worker


class LocalPool(Pool):
    """`workers` processes on this machine, with at most `memory` bytes each."""

    def __init__(self, workers: int, *, memory: int = WORKER_MEMORY) -> None:
        super().__init__(workers, start=partial(LocalWorker, memory=memory))


class _Counter:
    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, _: int) -> None:
        with self._lock:
            self.value += 1
