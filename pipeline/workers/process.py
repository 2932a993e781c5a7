"""A worker process: it receives tasks over a pipe and answers over it, until the pipe closes.

Workers come from a fork server that has imported only what they need. Forking the parent would use less memory, but a training process has
many threads (gloo, DeepSpeed, the progress display, CUDA), and a lock held by one of them during the fork stays locked in the child
forever. Spawned processes would each import torch, 300 MB each; those of a fork server share its pages and own 20 to 60 MB.

Every worker has its own pipe: the worker's end closes when it dies, the parent's when the parent dies. Running workers do not depend on
the fork server.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.errors import one_line
from pipeline.foreign_warnings import hide_if_asked

Task = TypeVar("Task")
Result = TypeVar("Result")

Report = Callable[[int], None]
"""A task function calls it with the number (≥ 0) of each item of its task before working on it, and may call it with `NO_ITEM` after."""
NO_ITEM = -1
ONE_THREAD: dict[str, str] = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
"""Environment of a worker: the pool uses the cores."""

_STARTING, _IDLE = -2, -1  # in place of a task's number
_OUT_OF_MEMORY = 113  # exit code
_END_SECONDS = 5.0
_lock = threading.Lock()


@dataclass(frozen=True)
class Stages(Generic[Task, Result]):
    """A task function in two stages: a thread of the worker fetches the next task while another runs the current one."""

    fetch: Callable[[Task], Any]
    run: Callable[[Any, Report], Result]


class Order(NamedTuple):
    """A pickled task. `work` is the number of its function, and `function` the pickled function if the worker does not have it yet."""

    number: int
    task: bytes
    work: int
    function: bytes | None


class Answer(NamedTuple):
    """The outcome of a task: its result, or its exception and the traceback."""

    number: int
    value: Any
    traceback: str | None = None


class Progress(NamedTuple):
    """What a worker is doing: number of its task, the item that it reported last, and how many items it has reported."""

    task: int
    item: int
    items: int


class WorkerProcess:
    """The parent's end of a worker process. It ends when it needs more than `memory` bytes of data of its own, if that is given."""

    def __init__(self, name: str, *, memory: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self._marks: Any = context.RawArray("q", [_STARTING, NO_ITEM, 0])
        arguments = theirs, self._marks, {**os.environ, **ONE_THREAD}, memory
        self._process: BaseProcess = context.Process(target=_serve, args=arguments, name=name, daemon=True)
        with _without_main_script():
            self._process.start()
        theirs.close()

    @property
    def name(self) -> str:
        """For people: the name and the process id."""
        return f"{self._process.name} (pid {self._process.pid})"

    def progress(self) -> Progress:
        """What it does, or did when it died."""
        return Progress(*self._marks)

    def receive(self) -> Answer | None:
        """Its next answer. None if it died before the answer was received and opened.

        Raises RuntimeError if it is alive but this process cannot open the answer.
        """
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=_END_SECONDS)
            if self._process.is_alive():
                raise RuntimeError(f"cannot receive the result of {self.name}: {error}") from error
            return None

    def how_it_ended(self) -> str:
        """For people, after "it": "was killed by signal 9 (SIGKILL)"."""
        code = self._process.exitcode
        if code == _OUT_OF_MEMORY:
            return "needed more memory than a worker may take"
        return f"was killed by {signal_name(-code)}" if code is not None and code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End it, also if it hangs."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a killed process, and close the pipe."""
        self._process.join(timeout=_END_SECONDS)
        self.pipe.close()


def start_fork_server(*modules: str) -> None:
    """Start the fork server with these modules imported. Takes as long as the imports, so call it early; a second call has no effect."""
    with _lock:
        multiprocessing.set_forkserver_preload(["pipeline.workers.preload", *modules])
        forkserver.ensure_running()


@contextmanager
def _without_main_script() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in the worker, which needs nothing from it."""
    with _lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def signal_name(number: int) -> str:
    """`signal_name(9)` → "signal 9 (SIGKILL)"."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _serve(pipe: Connection, marks: Any, environment: dict[str, str], memory: int | None) -> None:
    """Main loop of a worker, until its pipe closes. A thread drains the pipe, so that neither side blocks the other."""
    os.environ.clear()  # the fork server's environment may be outdated: credentials, proxies, limits
    os.environ.update(environment)
    hide_if_asked()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all processes of a job; the parent handles them
        signal.signal(number, signal.SIG_IGN)
    if memory is not None:
        limit = _data_bytes() + memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def report(item: int) -> None:
        marks[1] = item
        marks[2] += item != NO_ITEM

    marks[0] = _IDLE
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    fetched: queue.Queue[tuple[int, Callable[[], Any]]] = queue.Queue(maxsize=1)
    _start_thread(_receive_orders, pipe, orders)
    _start_thread(_fetch_ahead, orders, fetched, report)
    while True:
        number, run = fetched.get()
        marks[0] = number
        answer = _answer(number, run)
        marks[1] = NO_ITEM
        with _ends_with_parent():
            _send(pipe, answer)


def _start_thread(target: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=_end_process_on_error, args=(target, *arguments), daemon=True).start()


def _end_process_on_error(target: Callable[..., None], *arguments: Any) -> None:
    """Without one of its threads a worker would wait forever."""
    try:
        target(*arguments)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@contextmanager
def _ends_with_parent() -> Iterator[None]:
    """End this process if the parent has closed the pipe, or is dead."""
    try:
        yield
    except (EOFError, OSError):
        os._exit(0)


def _data_bytes() -> int:
    """Data that this process has mapped, part of it shared with the fork server; 0 where that is unknown."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


def _receive_orders(pipe: Connection, orders: queue.SimpleQueue[Order]) -> None:
    with _ends_with_parent():
        while True:
            orders.put(pipe.recv())


def _fetch_ahead(orders: queue.SimpleQueue[Order], fetched: queue.Queue[tuple[int, Callable[[], Any]]], report: Report) -> None:
    """Unpickle tasks, run their first stage, and hand on the rest of their work."""
    functions: dict[int, Any] = {}
    while True:
        order = orders.get()
        try:
            if order.function is not None:
                functions[order.work] = pickle.loads(order.function)
            work, task = functions[order.work], pickle.loads(order.task)
            run = partial(work.run, work.fetch(task), report) if isinstance(work, Stages) else partial(work, task, report)
        except Exception as error:
            run = partial(_raise, error)
        fetched.put((order.number, run))


def _raise(error: Exception) -> None:
    raise error


def _answer(number: int, run: Callable[[], Any]) -> Answer:
    try:
        return Answer(number, run())
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except Exception as error:
        return Answer(number, error, traceback.format_exc())


def _send(pipe: Connection, answer: Answer) -> None:
    """Send an answer, or a RuntimeError in place of what cannot be pickled. Raises OSError if the parent is gone."""
    try:
        if answer.traceback is not None:
            pickle.loads(pickle.dumps(answer.value))
        pipe.send(answer)
    except OSError:
        raise
    except Exception as error:
        reason = f"{type(answer.value).__name__}: {answer.value}" if answer.traceback else f"a result cannot be sent: {one_line(error)}"
        pipe.send(Answer(answer.number, RuntimeError(reason), answer.traceback or traceback.format_exc()))
