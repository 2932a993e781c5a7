"""Processes that fetch and decode items, and return the results in order.

In each process, one thread fetches an item while another decodes the previous one, so that waiting for storage costs no time.

Workers come from a fork server that has imported only torch and the readers. Forking the training process would use less memory, but by
then it has many threads (gloo, DeepSpeed, the progress display, CUDA), and a lock held by one of them during the fork stays locked in the
child forever, for example that of rich's console, which any warning may use. Spawned processes would each import torch, 300 MB each;
those of a fork server share its pages and own 20 to 60 MB.

torch's DataLoader is not used, because it relies on SIGCHLD, which goes to the fork server: it would notice a dead worker only at its
timeout, and its workers would outlive a killed training process. Here every worker has its own pipe: the worker's end closes when it
dies, ours when the training process dies. Running workers do not depend on the fork server.

A native decoder may crash its process on untrusted bytes. A worker records in shared memory which part of which item it decodes, so that
the part can be named, and skipped after the second crash.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

import torch

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Fetched_contra = TypeVar("Fetched_contra", contravariant=True)
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

_CLOSING_SECONDS = 5.0
_POLL_SECONDS = 1.0
_STRIKES = 2  # one death may have an external cause; a second at the same part is caused by the part
_MAX_DEATHS = 4  # in a row, without a result and without a part as the cause
_NO_PART = -1


class Decode(Protocol[Fetched_contra, Result_co]):
    """Decode a fetched item, part by part.

    It must call `begin` with a part's number before decoding the part, and with −1 after the last one. It must skip the parts in `lost`,
    which maps them to reasons.
    """

    def __call__(self, fetched: Fetched_contra, /, *, begin: Callable[[int], None] = ..., lost: Mapping[int, str] = ...) -> Result_co: ...


@dataclass(slots=True)
class _Task(Generic[Item]):
    """An item without a result yet: worker deaths by part, and the parts to skip with their reasons."""

    number: int
    item: Item
    strikes: dict[int, int] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Worker:
    """A process, its pipe, and `marks` in shared memory: number of its task, part being decoded, number of parts begun.

    `tasks` have no result yet, oldest first; the last `unsent` of them were not sent. The first `retried` were a dead process's and are
    sent one at a time.
    """

    process: BaseProcess
    pipe: Connection
    marks: Any
    tasks: deque[_Task[Any]] = field(default_factory=deque)
    unsent: int = 0
    retried: int = 0
    deaths: int = 0  # since the last progress


def start_fork_server() -> None:
    """Start the fork server with the imports of the workers. Takes a second or two, so call it early; a second call has no effect."""
    multiprocessing.set_forkserver_preload(["pipeline.loading.fork_server"])
    forkserver.ensure_running()


class WorkerPool(Generic[Item, Result]):
    """`workers` processes that apply `fetch`, then `decode`, both picklable, to items. Tensors are returned through shared memory.

    A dead worker is replaced, and its items are retried one at a time. If a worker dies twice at the same part of an item, or hangs there
    twice for `timeout` seconds, the part is lost: `decode` has to skip it. Which parts are lost depends only on the items, not on the
    number of workers. `name` gives the name of a part of an item, for the log.

    `get` raises RuntimeError if workers keep dying without a part as the cause, or if nothing is fetched for `timeout` seconds. `close()`
    ends all workers, also hanging ones; so does the end of the pool or of this process.
    """

    def __init__(
        self,
        fetch: Callable[[Item], Any],
        decode: Decode[Any, Result],
        *,
        workers: int,
        timeout: float,
        name: Callable[[Item, int], str] = lambda _, part: f"part {part}",
    ) -> None:
        start_fork_server()
        self._functions = fetch, decode
        self._timeout = timeout
        self._name = name
        self._tasks = 0
        self._order: deque[_Worker] = deque()
        self._workers: list[_Worker] = []
        # At exit multiprocessing joins its processes without closing their pipes, so ours must be ended before.
        self.close = weakref.finalize(self, _end, self._workers)
        atexit.register(self.close)
        for number in range(workers):
            self._workers.append(_Worker(*self._start(f"reader-{number}")))

    def put(self, item: Item) -> None:
        """Give an item to the worker with the fewest tasks."""
        worker = min(self._workers, key=lambda each: len(each.tasks))
        task = _Task(self._tasks, item)
        self._tasks += 1
        worker.tasks.append(task)
        self._order.append(worker)
        worker.unsent += 1
        if worker.unsent == 1 and not worker.retried:
            _send_unsent(worker, limit=1)

    def get(self) -> Result:
        """The result of the oldest pending item. An exception in the worker is raised as a RuntimeError with its traceback."""
        worker = self._order.popleft()
        while True:
            death = self._wait(worker)
            if death is None:
                answer = _receive(worker)
                if answer is not None:
                    break
                death = _death(worker)
            self._replace(worker, death=death)
        worker.tasks.popleft()
        worker.deaths = 0
        worker.retried = max(0, worker.retried - 1)
        _send_unsent(worker, limit=1 if worker.retried else worker.unsent)
        succeeded, result = answer
        if not succeeded:
            raise RuntimeError(f"{worker.process.name} failed: {result}")
        return result

    def _start(self, name: str) -> tuple[BaseProcess, Connection, Any]:
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        marks = context.RawArray("q", [_NO_PART, _NO_PART, 0])
        arguments = theirs, *self._functions, marks, dict(os.environ)
        process = context.Process(target=_serve, args=arguments, name=name, daemon=True)
        process.start()
        theirs.close()
        return process, ours, marks

    def _wait(self, worker: _Worker) -> str | None:
        """Wait for the worker's result or its end. If it hangs in a part, kill it and return a description.

        Raises RuntimeError if it hangs elsewhere, that is in storage.
        """
        begun, since = worker.marks[2], time.monotonic()
        while not worker.pipe.poll(min(_POLL_SECONDS, self._timeout)):
            if worker.marks[2] != begun:
                begun, since = worker.marks[2], time.monotonic()
            if time.monotonic() - since < self._timeout:
                continue
            stuck = f"stuck for {self._timeout:g} s"
            if worker.marks[1] == _NO_PART:
                raise RuntimeError(f"{worker.process.name} (pid {worker.process.pid}) has been {stuck}: is the storage alive?")
            worker.process.kill()
            worker.process.join(timeout=_CLOSING_SECONDS)
            return f"was {stuck}"
        return None

    def _replace(self, worker: _Worker, *, death: str) -> None:
        """Replace a dead process; the new one retries its tasks, one at a time.

        Raises RuntimeError after too many deaths.
        """
        number, part, _ = worker.marks
        task = next((each for each in worker.tasks if each.number == number and part != _NO_PART), None)
        name, pid = worker.process.name, worker.process.pid
        at = ""
        worker.deaths += 1
        if task is not None:
            at = f" at {self._name(task.item, part)}"
            task.strikes[part] = task.strikes.get(part, 0) + 1
            if task.strikes[part] == _STRIKES:
                task.lost[part] = f"crashed: the process that decoded it {death}, like another one before"
                worker.deaths = 0
        if worker.deaths > _MAX_DEATHS:
            remedy = "after signal 9, memory may be short: try fewer loader.workers"
            raise RuntimeError(f"{name} died {worker.deaths} times in a row, the last time (pid {pid}) it {death}{at}: {remedy}")
        logger.warning("%s (pid %d) %s%s: a new process retries its work", name, pid, death, at)
        worker.pipe.close()
        worker.process, worker.pipe, worker.marks = self._start(name)
        worker.unsent = worker.retried = len(worker.tasks)
        _send_unsent(worker, limit=1)


def _send_unsent(worker: _Worker, *, limit: int) -> None:
    """Send up to `limit` unsent tasks. If the worker is dead they stay unsent until `get` notices."""
    for _ in range(limit):
        task = worker.tasks[-worker.unsent]
        try:
            worker.pipe.send((task.number, task.item, task.lost))
        except OSError:
            return
        worker.unsent -= 1


def _receive(worker: _Worker) -> tuple[bool, Any] | None:
    """The worker's result; None if it died before its result was received and opened.

    Raises RuntimeError if it is alive but this process could not open the result.
    """
    try:
        return worker.pipe.recv()
    except (EOFError, OSError) as error:
        worker.process.join(timeout=_CLOSING_SECONDS)
        if worker.process.is_alive():
            raise RuntimeError(f"cannot receive the result of {worker.process.name} (pid {worker.process.pid}): {error}") from error
        return None


def _end(workers: list[_Worker]) -> None:
    """End all workers, also hanging ones."""
    for worker in workers:
        worker.pipe.close()
    for worker in workers:
        worker.process.join(timeout=_CLOSING_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(timeout=_CLOSING_SECONDS)
    workers.clear()


def _death(worker: _Worker) -> str:
    code = worker.process.exitcode
    return f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _serve(pipe: Connection, fetch: Callable[[Any], Any], decode: Decode[Any, Any], marks: Any, environment: dict[str, str]) -> None:
    """Main loop of a worker, until its pipe closes. A thread drains the pipe, so that neither side blocks the other."""
    os.environ.clear()  # the fork server's environment may be outdated: credentials, proxies, limits
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all processes of a job; the training process handles them
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def begin(part: int) -> None:
        marks[1] = part
        marks[2] += 1

    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    fetched: queue.Queue[tuple[int, Mapping[int, str], bool, Any]] = queue.Queue(maxsize=1)
    threading.Thread(target=_receive_tasks, args=(pipe, tasks), daemon=True).start()
    threading.Thread(target=_fetch_ahead, args=(fetch, tasks, fetched), daemon=True).start()
    while True:
        task, lost, *answer = fetched.get()
        marks[0] = task
        if answer[0]:
            answer = _attempt(partial(decode, begin=begin, lost=lost), answer[1])
        marks[1] = _NO_PART
        try:
            pipe.send(tuple(answer))
        except OSError:
            os._exit(0)


def _receive_tasks(pipe: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # the training process has closed the pipe, or is dead


def _fetch_ahead(fetch: Callable[[Any], Any], tasks: queue.SimpleQueue[Any], fetched: queue.Queue[Any]) -> None:
    while True:
        number, item, lost = tasks.get()
        fetched.put((number, lost, *_attempt(fetch, item)))


def _attempt(function: Callable[[Any], Any], argument: Any) -> tuple[bool, Any]:
    """(True, result) or (False, traceback)."""
    try:
        return True, function(argument)
    except Exception:
        return False, traceback.format_exc()
