from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from dataprep.workers.pool import LocalPool, WorkerDied
from dataprep.workers.process import LocalWorker


@dataclass(frozen=True)
class Job:
    number: int
    deadly: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()


def square(number: int, report: Callable[[int], None]) -> int:
    report(0)
    time.sleep(0.002 * (number % 3))
    return number * number


def chatty(number: int, report: Callable[[int], None]) -> int:
    print("a library that prints", flush=True)
    os.write(1, b"and one that writes\n")
    return number


def fail(number: int, report: Callable[[int], None]) -> int:
    raise ValueError(f"{number} is wrong")


def walk(job: Job, report: Callable[[int], None]) -> tuple[int, int]:
    for item in range(5):
        report(item)
        if item in job.deadly and item not in job.skip:
            os.kill(os.getpid(), signal.SIGKILL)
    return job.number, len(job.skip)


def process_id(number: int, report: Callable[[int], None]) -> int:
    return os.getpid()


def test_results_keep_the_order_of_the_tasks_and_few_are_drawn_ahead() -> None:
    drawn = 0

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for number in range(40):
            drawn = number + 1
            yield number

    with LocalPool(2) as pool:
        for place, result in enumerate(pool.map(square, tasks())):
            assert result == place * place
            assert drawn <= place + 2 * 2 + 1


def test_output_of_libraries_does_not_disturb_the_answers() -> None:
    with LocalPool(1) as pool:
        assert list(pool.map(chatty, [1, 2])) == [1, 2]


def test_errors_come_home() -> None:
    with LocalPool(1) as pool:
        with pytest.raises(ValueError, match="7 is wrong"):
            list(pool.map(fail, [7]))
        assert list(pool.map(square, [3])) == [9]


def test_a_death_is_told_with_its_place_and_can_be_worked_around() -> None:
    with LocalPool(2) as pool:
        with pytest.raises(WorkerDied, match="signal 9") as death:
            list(pool.map(walk, [Job(0, deadly=(3,))]))
        assert death.value.at == 3

        def skip(job: Job, death: WorkerDied) -> Job:
            return replace(job, skip=(*job.skip, death.at))

        jobs = [Job(0), Job(1, deadly=(0, 4)), Job(2), Job(3, deadly=(2,)), Job(4)]
        assert list(pool.map(walk, jobs, retry=skip)) == [(0, 0), (1, 2), (2, 0), (3, 1), (4, 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_leaving_the_pool_ends_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataprep.workers.pool.LocalWorker", LocalWorker)  # other tests hand theirs on
    with LocalPool(2) as pool:
        processes = set(pool.map(process_id, range(6)))
    assert processes
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)
    with pytest.raises(ValueError, match="workers is 0"):
        LocalPool(0)
