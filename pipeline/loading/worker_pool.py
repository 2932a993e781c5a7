"""A few processes that fetch and then decode one item after the other, and give the results back in order.

In each, one thread fetches an item while another decodes the one before it, so that waiting for storage costs no time.

They come from a fork server that has imported torch and the readers, and nothing else. Forking the training process itself would be
lighter still, but it is full of threads by then (gloo, DeepSpeed, the progress display, CUDA), and a lock that one of them holds at that
moment stays locked in the child for ever; rich's console, which a warning is enough to meet, is one. Spawned processes would import
torch anew, 300 MB each; those of a fork server share its pages and own 20 to 60 MB.

torch's DataLoader is not used, because it relies on SIGCHLD, which goes to the fork server: it would see a dead worker only at its
timeout, and its workers would outlive a training process that is killed. Here every worker has a pipe of its own, whose end tells both:
the worker's end closes when it dies, ours when the training process does. Nothing depends on the fork server once workers run.

A native decoder that is fed untrusted bytes may take its process down. A worker notes in shared memory which part of which item it is
at, so that the part can be named, and given up, when that has happened twice.
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
_GLANCE_SECONDS = 1.0
_STRIKES = 2  # one death may come from outside; the second at the same part of the same item is that part's
_MAX_DEATHS = 4  # in a row, without an answer and without a part to blame
_NO_PART = -1


class Decode(Protocol[Fetched_contra, Result_co]):
    """Makes a result of what was fetched, part by part.

    `begin` is to be called with a part's number before the part is looked at, and with −1 after the last one. Parts in `lost` are not to
    be looked at, for the reasons given.
    """

    def __call__(self, fetched: Fetched_contra, /, *, begin: Callable[[int], None] = ..., lost: Mapping[int, str] = ...) -> Result_co: ...


@dataclass(slots=True)
class _Task(Generic[Item]):
    """An item without an answer yet: how often a worker died at each of its parts, and those that are given up."""

    number: int
    item: Item
    strikes: dict[int, int] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Worker:
    """A process, its pipe, and memory that it shares: the number of its task, the part of it that is being decoded, and how many parts
    it has begun. `tasks` have no answer yet, the oldest first; the last `held` of them were not sent. The first
    `careful` were a dead process's and are sent one at a time."""

    process: BaseProcess
    pipe: Connection
    marks: Any
    tasks: deque[_Task[Any]] = field(default_factory=deque)
    held: int = 0
    careful: int = 0
    deaths: int = 0  # since the last progress


def start_fork_server() -> None:
    """Have the fork server import what workers need. It takes a second or two, so call this early; a second call does nothing."""
    multiprocessing.set_forkserver_preload(["pipeline.loading.fork_server"])
    forkserver.ensure_running()


class WorkerPool(Generic[Item, Result]):
    """`workers` processes that apply `fetch`, then `decode`, both picklable, to items. Tensors come back through shared memory.

    A worker that dies is replaced, and its items are done again, one at a time. Where a worker dies twice at the same part of an item, or
    is stuck there for `timeout` seconds twice, the part is lost: `decode` is told to leave it out. Which parts are lost depends on the
    items alone, not on the number of workers. `name` tells what a part of an item is called, for the log.

    `get` and `put` raise RuntimeError if workers die again and again without a part to blame, and `get` if nothing is fetched for
    `timeout` seconds. `close()` ends all workers, also those that are stuck; so does the end of the pool or of this process.
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
        # At exit multiprocessing waits for its processes without closing their pipes: ours have to end before, or never would.
        self.close = weakref.finalize(self, _end, self._workers)
        atexit.register(self.close)
        for number in range(workers):
            self._workers.append(_Worker(*self._start(f"reader-{number}")))

    def put(self, item: Item) -> None:
        """Hand an item to the worker with the least to do."""
        worker = min(self._workers, key=lambda each: len(each.tasks))
        task = _Task(self._tasks, item)
        self._tasks += 1
        worker.tasks.append(task)
        self._order.append(worker)
        worker.held += 1
        if worker.held == 1 and not worker.careful:
            _send_held(worker, most=1)

    def get(self) -> Result:
        """The result of the oldest item that has none yet; an exception in the worker is raised as a RuntimeError that quotes it."""
        worker = self._order.popleft()
        while True:
            death = self._stuck(worker)
            if death is None:
                answer = _receive(worker)
                if answer is not None:
                    break
                death = _death(worker)
            self._revive(worker, death=death)
        worker.tasks.popleft()
        worker.deaths = 0
        worker.careful = max(0, worker.careful - 1)
        _send_held(worker, most=1 if worker.careful else worker.held)
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

    def _stuck(self, worker: _Worker) -> str | None:
        """Wait for the worker's answer or its end. Returns how it ended if it was stuck in a part, and kills it.

        Raises RuntimeError if it is stuck anywhere else: in storage.
        """
        begun, since = worker.marks[2], time.monotonic()
        while not worker.pipe.poll(min(_GLANCE_SECONDS, self._timeout)):
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

    def _revive(self, worker: _Worker, *, death: str) -> None:
        """Put a new process in the place of a dead one, which does its tasks again, one at a time.

        Raises RuntimeError if that does not help.
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
                task.lost[part] = f"crashed: the process that decoded it {death}, after another one had ended there, too"
                worker.deaths = 0
        if worker.deaths > _MAX_DEATHS:
            remedy = "after signal 9 memory may be short, try fewer loader.workers"
            raise RuntimeError(f"{name} died {worker.deaths} times in a row, the last time (pid {pid}) it {death}{at}: {remedy}")
        logger.warning("%s (pid %d) %s%s: a new one does its work again", name, pid, death, at)
        worker.pipe.close()
        worker.process, worker.pipe, worker.marks = self._start(name)
        worker.held = worker.careful = len(worker.tasks)
        _send_held(worker, most=1)


def _send_held(worker: _Worker, *, most: int) -> None:
    """Send the first of the tasks that are held; where the worker is dead they stay so, until `get` finds that out."""
    for _ in range(most):
        task = worker.tasks[-worker.held]
        try:
            worker.pipe.send((task.number, task.item, task.lost))
        except OSError:
            return
        worker.held -= 1


def _receive(worker: _Worker) -> tuple[bool, Any] | None:
    """The worker's answer, None if it died before, while it sent this, or before we could open what it sent.

    Raises RuntimeError if it lives, and this process could not open it.
    """
    try:
        return worker.pipe.recv()
    except (EOFError, OSError) as error:
        worker.process.join(timeout=_CLOSING_SECONDS)
        if worker.process.is_alive():
            raise RuntimeError(f"what {worker.process.name} (pid {worker.process.pid}) has read cannot be taken over: {error}") from error
        return None


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
    code = worker.process.exitcode
    return f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _serve(pipe: Connection, fetch: Callable[[Any], Any], decode: Decode[Any, Any], marks: Any, environment: dict[str, str]) -> None:
    """The life of a worker, until its pipe closes. A thread empties the pipe, so that neither side waits for the other."""
    os.environ.clear()  # the fork server's is older than credentials, proxies and limits that were set since
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all of a job; the training process obeys
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def begin(part: int) -> None:
        marks[1] = part
        marks[2] += 1

    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    fetched: queue.Queue[tuple[int, Mapping[int, str], bool, Any]] = queue.Queue(maxsize=1)
    threading.Thread(target=_take_off, args=(pipe, tasks), daemon=True).start()
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


def _take_off(pipe: Connection, tasks: queue.SimpleQueue[Any]) -> None:
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
    """Whether it succeeded, and its result or what went wrong."""
    try:
        return True, function(argument)
    except Exception:
        return False, traceback.format_exc()
