"""A few processes that fetch and then decode one item after the other, and give the results back in order.

In each, one thread fetches an item while another decodes the one before it, so that waiting for storage costs no time.

They come from a fork server that has imported torch and the readers, and nothing else. Forking the training process itself would be
lighter still, but it is full of threads by then (gloo, DeepSpeed, the progress display, CUDA), and a lock that one of them holds at that
moment stays locked in the child for ever; rich's console, which a warning is enough to meet, is one. Spawned processes would import
torch anew, 300 MB each; those of a fork server share its pages and own 20 to 60 MB.

torch's DataLoader is not used, because it relies on SIGCHLD, which goes to the fork server: it would see a dead worker only at its
timeout, and its workers would outlive a training process that is killed. Here every worker has a pipe of its own, whose end tells both:
the worker's end closes when it dies, ours when the training process does. Nothing depends on the fork server once workers run.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Fetched = TypeVar("Fetched")
Result = TypeVar("Result")

_CLOSING_SECONDS = 5.0


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    unanswered: int = 0


def start_fork_server() -> None:
    """Have the fork server import what workers need. It takes a second or two, so call this early; a second call does nothing."""
    multiprocessing.set_forkserver_preload(["pipeline.fork_server"])
    forkserver.ensure_running()


class WorkerDied(RuntimeError):
    """A worker process ended without an answer."""


class WorkerPool(Generic[Item, Result]):
    """`workers` processes that apply `fetch`, then `decode`, both picklable, to items. Tensors come back through shared memory.

    A result that takes longer than `timeout` seconds is a RuntimeError in `get`, a worker's death is WorkerDied in `put` or `get`.
    `close()` ends all workers, also those that are stuck; so does the end of the pool or of this process.
    """

    def __init__(self, fetch: Callable[[Item], Fetched], decode: Callable[[Fetched], Result], *, workers: int, timeout: float) -> None:
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        self._timeout = timeout
        self._order: deque[_Worker] = deque()
        self._workers: list[_Worker] = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, fetch, decode, dict(os.environ)), name=f"reader-{number}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process=process, pipe=ours))
        # At exit multiprocessing waits for its processes without closing their pipes: ours have to end before, or never would.
        self.close = weakref.finalize(self, _end, self._workers)
        atexit.register(self.close)

    def put(self, item: Item) -> None:
        """Hand an item to the worker with the least to do."""
        worker = min(self._workers, key=lambda each: each.unanswered)
        try:
            worker.pipe.send(item)
        except OSError as error:
            raise WorkerDied(_death(worker)) from error
        worker.unanswered += 1
        self._order.append(worker)

    def get(self) -> Result:
        """The result of the oldest item that has none yet; an exception in the worker is raised as a RuntimeError that quotes it."""
        worker = self._order.popleft()
        if not worker.pipe.poll(self._timeout):
            raise RuntimeError(
                f"{worker.process.name} (pid {worker.process.pid}) has been stuck for {self._timeout:g} s: is the storage alive?"
            )
        try:
            succeeded, result = worker.pipe.recv()
        except (EOFError, OSError) as error:  # it died while it sent this, or before we could open what it sent
            raise WorkerDied(_death(worker)) from error
        worker.unanswered -= 1
        if not succeeded:
            raise RuntimeError(f"{worker.process.name} failed: {result}")
        return result


def _end(workers: list[_Worker]) -> None:
    """End all workers, also those that are stuck."""
    for worker in workers:
        worker.pipe.close()
    for worker in workers:
        worker.process.join(timeout=_CLOSING_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(timeout=_CLOSING_SECONDS)
    workers.clear()


def _death(worker: _Worker) -> str:
    worker.process.join(timeout=_CLOSING_SECONDS)
    code = worker.process.exitcode
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return f"{worker.process.name} (pid {worker.process.pid}) died, {how}; after signal 9 memory may be short, try fewer loader.workers"


def _serve(pipe: Connection, fetch: Callable[[Any], Any], decode: Callable[[Any], Any], environment: dict[str, str]) -> None:
    """The life of a worker, until its pipe closes. A thread empties the pipe, so that neither side waits for the other."""
    os.environ.clear()  # the fork server's is older than credentials, proxies and limits that were set since
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all of a job; the training process obeys
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    fetched: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=1)
    threading.Thread(target=_take_off, args=(pipe, items), daemon=True).start()
    threading.Thread(target=_fetch_ahead, args=(fetch, items, fetched), daemon=True).start()
    while True:
        answer = fetched.get()
        if answer[0]:
            answer = _attempt(decode, answer[1])
        try:
            pipe.send(answer)
        except OSError:
            os._exit(0)


def _take_off(pipe: Connection, items: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            items.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # the training process has closed the pipe, or is dead


def _fetch_ahead(fetch: Callable[[Any], Any], items: queue.SimpleQueue[Any], fetched: queue.Queue[tuple[bool, Any]]) -> None:
    while True:
        fetched.put(_attempt(fetch, items.get()))


def _attempt(function: Callable[[Any], Any], argument: Any) -> tuple[bool, Any]:
    """Whether it succeeded, and its result or what went wrong."""
    try:
        return True, function(argument)
    except Exception:
        return False, traceback.format_exc()
