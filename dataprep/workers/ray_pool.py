"""Workers on a Ray cluster.

Each is an actor with a local pool of one process: a crashed decoder can be distinguished from a lost node, and does not crash Ray. Sources
and the work folder must be on storage that all nodes share.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

from dataprep.workers.pool import WORKER_MEMORY, LocalPool
from pipeline.errors import one_line
from pipeline.workers.pool import Retry, WorkerDied
from pipeline.workers.process import Report

Task = TypeVar("Task")
Result = TypeVar("Result")

_ATTEMPTS = 3  # for a task whose nodes are lost


class RayPool:
    """`workers` workers on the Ray cluster at `address`, by default one per CPU of the cluster. Without an address: the cluster running on
    this machine, or that of RAY_ADDRESS. Raises ValueError if there is no such cluster or it is too small."""

    def __init__(self, workers: int | None = None, *, address: str | None = None, memory: int = WORKER_MEMORY) -> None:
        cores = _connect(address)
        if workers is not None and workers > cores:
            raise ValueError(f"{workers} workers: the Ray cluster has {cores} CPUs, give no more")
        self._workers = workers or cores
        self._memory = memory
        self._threads = ThreadPoolExecutor(self._workers)  # each has an actor
        self._own = threading.local()
        self._lock = threading.Lock()
        self._actors: list[Any] = []
        self._is_open = True

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import ray

        with self._lock:
            self._is_open = False
        for actor in self._actors:
            ray.kill(actor)
        self._threads.shutdown(cancel_futures=True)

    def map(
        self,
        work: Callable[[Task, Report], Result],
        tasks: Iterable[Task],
        *,
        retry: Retry[Task] | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> Iterator[Result]:
        """As of a local pool, but items are counted at the end of their task. Raises WorkerDied also after three lost nodes."""
        remaining, reported = iter(tasks), 0
        waiting = deque(self._threads.submit(self._run, work, task, retry) for task in islice(remaining, 2 * self._workers))
        while waiting:
            result, items = waiting.popleft().result()
            reported += items
            if on_items:
                on_items(reported)
            waiting.extend(self._threads.submit(self._run, work, task, retry) for task in islice(remaining, 1))
            yield result

    def _run(self, work: Callable[..., Any], task: Any, retry: Retry[Any] | None) -> tuple[Any, int]:
        """The result of a task and its number of reported items."""
        import ray
        from ray.exceptions import RayActorError

        lost: WorkerDied | None = None
        for _ in range(_ATTEMPTS):
            try:
                value, items, failed = ray.get(self._actor().run.remote(work, task, retry))
            except RayActorError as error:
                self._own.actor = None
                lost = WorkerDied("a worker on the Ray cluster", f"was lost ({one_line(error)})")
                continue
            if failed:
                raise value
            return value, items
        assert lost
        raise lost

    def _actor(self) -> Any:
        """The actor of this thread."""
        import ray

        actor: Any = getattr(self._own, "actor", None)
        if actor is None:
            with self._lock:
                if not self._is_open:
                    raise RuntimeError("the pool is closed")
                host: Any = ray.remote(num_cpus=1, max_restarts=0)(_Host)
                actor = self._own.actor = host.remote(self._memory)
                self._actors.append(actor)
        return actor


class _Host:
    """The actor: runs tasks in its own worker process."""

    def __init__(self, memory: int) -> None:
        self._pool = LocalPool(1, memory=memory)

    def run(self, work: Callable[..., Any], task: Any, retry: Retry[Any] | None) -> tuple[Any, int, bool]:
        """Result or exception, number of reported items, and whether it is an exception."""
        items = [0]
        try:
            return next(self._pool.map(work, [task], retry=retry, on_items=items.append)), items[-1], False
        except Exception as error:
            return error, items[-1], True


def _connect(address: str | None) -> int:
    """Connect to the cluster unless this process is connected. Returns its number of CPUs."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("the Ray executor needs Ray: pip install 'tim[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            remedy = "start one with `ray start --head`, or give the address of one"
            raise ValueError(f"no Ray cluster at {address or 'the default address'} ({one_line(error)}): {remedy}") from error
    return int(ray.cluster_resources().get("CPU", 0))
