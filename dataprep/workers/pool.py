"""What preparing needs of a pool of workers, on this machine or on a Ray cluster (`dataprep.workers.ray_pool`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol, TypeVar

from pipeline.workers.pool import Retry, WorkerPool
from pipeline.workers.process import Report

Task = TypeVar("Task")
Result = TypeVar("Result")

WORKER_MEMORY = 8 << 30
"""Default memory limit of a worker in bytes: three times the need of the largest image within the default limits."""


class Pool(Protocol):
    """Workers that run tasks. A context manager, which ends them."""

    def __enter__(self) -> Pool: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /) -> None: ...

    def map(
        self,
        work: Callable[[Task, Report], Result],
        tasks: Iterable[Task],
        *,
        retry: Retry[Task] | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> Iterator[Result]:
        """See `pipeline.workers.pool.WorkerPool.map`."""
        ...


class LocalPool(WorkerPool):
    """`workers` processes on this machine, with at most `memory` bytes each."""

    def __init__(self, workers: int, *, memory: int = WORKER_MEMORY) -> None:
        super().__init__(workers, memory=memory)
