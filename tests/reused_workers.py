"""Workers of preparations that outlive their pool: tests would mostly wait for a fresh interpreter for each small corpus."""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dataprep.workers.process import WORKER_MEMORY, LocalWorker, Report

_starter = ThreadPoolExecutor(1)  # a worker dies with the thread that started it, and those of a pool end with the pool
_parked: defaultdict[object, list[ReusedWorker]] = defaultdict(list)


class ReusedWorker(LocalWorker):
    """Where a pool ends while it has nothing to do, the next pool in the same surroundings takes it over; else it ends with its pool."""

    def __init__(self, *, memory: int) -> None:
        super().__init__(memory=memory)
        self._surroundings = _surroundings(memory)
        self._lock = threading.Lock()
        self._is_idle, self._is_dismissed = True, False

    def run(self, work: Callable[..., Any], task: Any, *, report: Report) -> Any:
        with self._lock:
            self._is_idle = False
        result = super().run(work, task, report=report)
        with self._lock:
            self._is_idle = True
        return result

    def is_alive(self) -> bool:
        return not self._is_dismissed and super().is_alive()

    def kill(self) -> None:
        with self._lock:
            self._is_dismissed = True
            if not self._is_idle:
                super().kill()

    def close(self) -> None:
        if self._is_idle and super().is_alive():
            self._is_dismissed = False
            _parked[self._surroundings].append(self)
        else:
            super().kill()
            super().close()


def take(*, memory: int = WORKER_MEMORY) -> ReusedWorker:
    """One that was left, or a new one."""
    parked = _parked[_surroundings(memory)]
    while parked:
        worker = parked.pop()
        if worker.is_alive():
            return worker
    return _starter.submit(ReusedWorker, memory=memory).result()


def _surroundings(memory: int) -> object:
    """What a worker has from its parent."""
    environment = frozenset((name, value) for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST")
    return memory, environment, os.getcwd(), tuple(sys.path)
