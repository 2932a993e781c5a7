"""A pool of worker processes with ordered results and crash recovery: an item that crashes its decoder costs a worker, not the run.

torch's DataLoader and concurrent.futures are not used: both end for good when a worker dies. A native decoder may crash its process on
untrusted bytes. Workers report in shared memory which item they work on, so that it can be named, and skipped at the next attempt.
"""

from __future__ import annotations

import atexit
import pickle
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from pipeline.workers.process import NO_ITEM, Answer, Order, Progress, Report, Stages, WorkerProcess, start_fork_server

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, Report], Result] | Stages[Task, Result]
"""A picklable task function, or two stages of one."""

_POLL_SECONDS = 0.2
_ATTEMPTS = 5  # for a task whose workers die without an item as the cause; a death may have an external one


class WorkerDied(RuntimeError):
    """A worker ended or hung without a result.

    `how`: "was killed by signal 9"; `at`: the item that it worked on, `NO_ITEM` if none; `times`: how many workers died at that item of
    the task, this one included. One death may have an external cause; a second at the same item is caused by the item.
    """

    def __init__(self, worker: str, how: str, at: int = NO_ITEM, times: int = 1) -> None:
        super().__init__(worker, how, at, times)
        self.worker = worker
        self.how = how
        self.at = at
        self.times = times

    def __str__(self) -> str:
        return f"{self.worker} {self.how}"


class WorkerStuck(RuntimeError):
    """A worker made no progress within the time limit while it worked on no item, so storage may be the cause. It is replaced."""


Retry = Callable[[Task, WorkerDied], Task]


class _RemoteTraceback(Exception):
    """The cause of an exception that was raised in a worker."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


@dataclass(slots=True, eq=False)
class _Pending(Generic[Task]):
    """A task without a result, and the deaths of its workers by item. It is retried `alone`, so that the next death has one suspect."""

    number: int
    work: Work[Task, Any]
    task: Task
    retry: Retry[Task] | None
    alone: bool = False
    deaths: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class _Worker:
    """A place for a worker process. `sent`: its tasks, oldest first; `functions`: those it has; `progress` was last seen at `since`."""

    name: str
    process: WorkerProcess | None = None
    sent: deque[_Pending[Any]] = field(default_factory=deque)
    functions: set[int] = field(default_factory=set)
    progress: Progress | None = None
    since: float = 0.0


class WorkerPool:
    """`workers` processes, started when they get work. They end with `close`, the `with` block, the pool, or this process.

    Args:
        name: of the workers, for messages.
        memory: bytes of data of its own that a worker may use; None for no limit.
        timeout: seconds that a worker may work on one item; it is then killed, as if it had crashed there. None for no limit.
        ahead: tasks that a worker may hold. With 1, each goes to the next free worker; with more, workers have work while this process
            collects no results.
        preload: modules that the fork server imports, unless it runs already.
        on_death: called with the task and the death after each death of a worker that had one.
    """

    def __init__(
        self,
        workers: int,
        *,
        name: str = "worker",
        memory: int | None = None,
        timeout: float | None = None,
        ahead: int = 1,
        preload: Sequence[str] = ("pipeline.images",),
        on_death: Callable[[Any, WorkerDied], None] = lambda task, death: None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: give 1 or more")
        start_fork_server(*preload)
        self._memory, self._timeout, self._ahead, self._on_death = memory, timeout, ahead, on_death
        self._workers = [_Worker(f"{name}-{number}") for number in range(workers)]
        self._functions: dict[Work[Any, Any], tuple[int, bytes]] = {}
        self._tasks = 0
        self._unsent: list[_Pending[Any]] = []
        self._answers: dict[int, Answer] = {}
        self._items_of_the_dead = 0
        # At exit multiprocessing joins its processes without ending them, so ours must be ended before.
        self.close = weakref.finalize(self, _end, self._workers)
        atexit.register(self.close)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def put(self, work: Work[Task, Any], task: Task, *, retry: Retry[Task] | None = None) -> int:
        """Give a task to the pool. Returns its number, for `get`.

        After a worker died at an item, `retry` returns the task for another attempt, or raises to give up. Without it, or if the worker
        died at no item, the task is tried five times.
        """
        if work not in self._functions:
            self._functions[work] = len(self._functions), pickle.dumps(work)
        pending = _Pending(self._tasks, work, task, retry)
        self._tasks += 1
        self._unsent.append(pending)
        self._send_unsent()
        return pending.number

    def get(self, number: int) -> Any:
        """Wait for the result of a task, which can be collected once.

        Raises what the task function raised, WorkerDied if the task was given up, and WorkerStuck if its worker made no progress for
        `timeout` seconds while it worked on no item. The pool goes on with the other tasks.
        """
        self._restart_clocks()
        while number not in self._answers:
            self._advance()
        _, value, trace = self._answers.pop(number)
        if trace is None:
            return value
        try:
            raise value from (_RemoteTraceback(trace) if trace else None)
        finally:
            del value  # whose traceback has this frame, so that both and the callers' locals would stay until the next collection

    def map(
        self,
        work: Work[Task, Result],
        tasks: Iterable[Task],
        *,
        retry: Retry[Task] | None = None,
        on_items: Callable[[int], None] | None = None,
    ) -> Iterator[Result]:
        """Results in task order; only a few tasks are taken ahead. See `put` for `retry`.

        `on_items` is called from time to time with the number of items reported so far.
        """
        remaining, items_before = iter(tasks), self._items()
        numbers = deque(self.put(work, task, retry=retry) for task in islice(remaining, 2 * len(self._workers)))
        while numbers:
            number = numbers.popleft()
            self._restart_clocks()
            while number not in self._answers:
                self._advance()
                if on_items:
                    on_items(self._items() - items_before)
            numbers.extend(self.put(work, task, retry=retry) for task in islice(remaining, 1))
            yield self.get(number)

    def _items(self) -> int:
        return self._items_of_the_dead + sum(worker.process.progress().items for worker in self._workers if worker.process)

    def _advance(self) -> None:
        """Wait a moment for answers, replace dead and hanging workers, and send tasks."""
        busy = {worker.process.pipe: worker for worker in self._workers if worker.process and worker.sent}
        if not busy:
            raise RuntimeError("the pool is closed")
        for pipe in wait(list(busy), timeout=min(_POLL_SECONDS, self._timeout or _POLL_SECONDS)):
            self._receive(busy.pop(pipe))  # pyright: ignore[reportArgumentType]
        for worker in busy.values():
            self._end_if_stuck(worker)
        self._send_unsent()

    def _receive(self, worker: _Worker) -> None:
        assert worker.process
        answer = worker.process.receive()
        if answer is None:
            self._bury(worker, how=worker.process.how_it_ended())
            return
        worker.sent.popleft()
        worker.since = time.monotonic()
        self._answers[answer.number] = answer

    def _end_if_stuck(self, worker: _Worker) -> None:
        """Kill a worker that hangs. If it hangs in no item, the answer to its task is WorkerStuck."""
        assert worker.process
        progress, now = worker.process.progress(), time.monotonic()
        if progress != worker.progress:
            worker.progress, worker.since = progress, now
        if self._timeout is None or now - worker.since < self._timeout:
            return
        stuck = f"stuck for {self._timeout:g} s"
        if progress.item != NO_ITEM:
            self._bury(worker, how=f"was {stuck}")
            return
        process, (suspect, *others) = self._ended(worker)
        self._answers[suspect.number] = Answer(suspect.number, WorkerStuck(f"{process.name} has been {stuck}"), "")
        self._put_back(others)

    def _bury(self, worker: _Worker, *, how: str) -> None:
        """Remove a dead or hanging process, and let its tasks be retried."""
        process, tasks = self._ended(worker)
        at = process.progress()
        current = next((pending for pending in tasks if pending.number == at.task), None)
        suspect = current or tasks[0]
        item = at.item if current else NO_ITEM
        suspect.deaths[item] += 1
        death = WorkerDied(process.name, how, item, suspect.deaths[item])
        self._on_death(suspect.task, death)
        for pending in tasks:
            pending.alone = True
        if not self._may_retry(suspect, death):
            tasks.remove(suspect)
        self._put_back(tasks)

    def _ended(self, worker: _Worker) -> tuple[WorkerProcess, list[_Pending[Any]]]:
        """The process of a worker, which is ended, and the tasks that it had."""
        assert worker.process
        process, tasks = worker.process, list(worker.sent)
        process.kill()
        process.close()
        self._items_of_the_dead += process.progress().items
        worker.process = None
        worker.sent.clear()
        return process, tasks

    def _put_back(self, tasks: Sequence[_Pending[Any]]) -> None:
        self._unsent = sorted([*tasks, *self._unsent], key=lambda pending: pending.number)

    def _may_retry(self, suspect: _Pending[Any], death: WorkerDied) -> bool:
        """Whether the task is to be retried, as changed by its `retry`. If not, its answer is the error."""
        try:
            if suspect.retry and death.at != NO_ITEM:
                suspect.task = suspect.retry(suspect.task, death)
                return True
            failures = suspect.deaths[NO_ITEM] if suspect.retry else suspect.deaths.total()
            if failures == _ATTEMPTS:
                raise WorkerDied(death.worker, f"{death.how}, the {_ATTEMPTS}th time that a worker died at this task", death.at)
        except Exception as error:
            self._answers[suspect.number] = Answer(suspect.number, error, "")
            return False
        return True

    def _send_unsent(self) -> None:
        kept: list[_Pending[Any]] = []
        for pending in self._unsent:
            worker = self._free_worker(pending)
            if worker is None:
                kept.append(pending)
            else:
                self._send(worker, pending)
        self._unsent = kept

    def _free_worker(self, pending: _Pending[Any]) -> _Worker | None:
        """The worker with the fewest tasks that may take one more."""
        free = [each for each in self._workers if not each.sent or (len(each.sent) < self._ahead and not each.sent[0].alone)]
        worker = min(free, key=lambda each: len(each.sent), default=None)
        return None if worker and worker.sent and pending.alone else worker

    def _send(self, worker: _Worker, pending: _Pending[Any]) -> None:
        """Send a task. If the worker is dead this is noticed when its answer is received."""
        if worker.process is None:
            worker.process = WorkerProcess(worker.name, memory=self._memory)
            worker.functions.clear()
        if not worker.sent:
            worker.since = time.monotonic()
        worker.sent.append(pending)
        number, function = self._functions[pending.work]
        order = Order(pending.number, pickle.dumps(pending.task), number, None if number in worker.functions else function)
        worker.functions.add(number)
        with suppress(OSError):
            worker.process.pipe.send(order)

    def _restart_clocks(self) -> None:
        """Time during which nobody waits for the workers does not count against them."""
        for worker in self._workers:
            worker.since = time.monotonic()


def _end(workers: list[_Worker]) -> None:
    """End all workers, also hanging ones."""
    processes = [worker.process for worker in workers if worker.process]
    for process in processes:
        process.kill()
    for process in processes:
        process.close()
    workers.clear()
