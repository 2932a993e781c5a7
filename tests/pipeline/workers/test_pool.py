from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dataprep.workers.pool import LocalPool
from pipeline.workers.pool import WorkerDied, WorkerPool, WorkerStuck
from pipeline.workers.process import NO_ITEM, Stages
from tests import REPOSITORY


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
def test_leaving_the_pool_ends_its_processes() -> None:
    with LocalPool(2) as pool:
        processes = set(pool.map(process_id, range(6)))
    assert processes
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)
    with pytest.raises(ValueError, match="workers is 0"):
        LocalPool(0)


def locked(number: int, report: Callable[[int], None]) -> object:
    return threading.Lock()


class Stubborn(Exception):
    def __init__(self, number: int, lock: object) -> None:
        super().__init__(f"{number} cannot be sent")
        self.lock = lock


def fail_stubbornly(number: int, report: Callable[[int], None]) -> int:
    raise Stubborn(number, threading.Lock())


def test_what_cannot_be_pickled_is_an_error_with_the_traceback_of_the_worker() -> None:
    with LocalPool(1) as pool:
        with pytest.raises(RuntimeError, match="a result cannot be sent: cannot pickle"):
            list(pool.map(locked, [1]))
        with pytest.raises(RuntimeError, match="Stubborn: 5 cannot be sent") as error:
            list(pool.map(fail_stubbornly, [5]))
        assert "in fail_stubbornly" in str(error.value.__cause__)
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            pool.put(lambda task, report: task, 1)
        assert list(pool.map(square, [3])) == [9]


def test_maps_of_one_pool_interleave() -> None:
    with LocalPool(2) as pool:
        squares, walks = pool.map(square, range(20)), pool.map(walk, map(Job, range(20)))
        assert list(zip(squares, walks, strict=True)) == [(number * number, (number, 0)) for number in range(20)]


def die(job: Job, report: Callable[[int], None]) -> None:
    os._exit(3)


def test_a_task_whose_workers_die_at_no_item_is_given_up() -> None:
    deaths: list[WorkerDied] = []
    with WorkerPool(2, ahead=4, on_death=lambda task, death: deaths.append(death)) as pool:
        number = pool.put(die, Job(0), retry=lambda job, death: job)
        later = [pool.put(square, value) for value in range(8)]
        with pytest.raises(WorkerDied, match=r"worker-\d \(pid \d+\) ended with exit code 3, the 5th time that a worker died at this task"):
            pool.get(number)
        assert [pool.get(each) for each in later] == [value * value for value in range(8)]
    assert [death.at for death in deaths] == [NO_ITEM] * 5


def hang(job: Job, report: Callable[[int], None]) -> tuple[int, ...]:
    for item in range(3):
        report(item)
        if item in job.deadly and item not in job.skip:
            time.sleep(1000)
    return job.skip


def hang_without_item(number: int, report: Callable[[int], None]) -> None:
    time.sleep(1000)


def test_a_worker_that_hangs_is_killed_and_named() -> None:
    with WorkerPool(2, timeout=1.0) as pool:
        jobs = [Job(0), Job(1, deadly=(1,)), Job(2)]
        assert list(pool.map(hang, jobs, retry=lambda job, death: replace(job, skip=(*job.skip, death.at)))) == [(), (1,), ()]
        with pytest.raises(WorkerStuck, match=r"worker-\d \(pid \d+\) has been stuck for 1 s"):
            list(pool.map(hang_without_item, [1]))
        assert list(pool.map(square, [3, 4])) == [9, 16]


def test_a_stuck_worker_costs_one_task() -> None:
    with WorkerPool(1, timeout=1.0, ahead=8) as pool:
        stuck, *others = [pool.put(hang_without_item, 0), *(pool.put(square, value) for value in (3, 4))]
        assert [pool.get(number) for number in others] == [9, 16]
        with pytest.raises(WorkerStuck):
            pool.get(stuck)


def fetch(name: str) -> str:
    if name.startswith("deadly"):
        os._exit(7)
    if name.startswith("wrong"):
        raise OSError(f"{name} is gone")
    return name.upper()


def attach(name: str, report: Callable[[int], None]) -> str:
    report(0)
    time.sleep(0.01)
    return f"<{name}>"


def test_a_second_stage_is_not_blamed_for_the_first() -> None:
    """The next task is fetched meanwhile: what happens there is that task's."""
    work = Stages(fetch=fetch, run=attach)
    blamed: list[str] = []

    def blame(name: str, death: WorkerDied) -> str:
        blamed.append(name)
        return name

    with WorkerPool(1, ahead=8) as pool:
        names = ["a", "b", "wrong", "c", "deadly", "d"]
        numbers = [pool.put(work, name, retry=blame) for name in names]
        assert [pool.get(number) for number in (*numbers[:2], numbers[3], numbers[5])] == ["<A>", "<B>", "<C>", "<D>"]
        with pytest.raises(OSError, match="wrong is gone"):
            pool.get(numbers[2])
        with pytest.raises(WorkerDied, match="exit code 7"):
            pool.get(numbers[4])
    assert set(blamed) <= {"c"}  # it may have been in hand at the first death


SCRIPT = """
from pipeline.workers.pool import WorkerPool
from tests.pipeline.workers.test_pool import square

print("once", flush=True)
with WorkerPool(2) as pool:
    print(list(pool.map(square, range(4))))
"""


def test_a_script_needs_no_guard_and_runs_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.stdout, run.stderr) == ("once\n[0, 1, 4, 9]\n", "")


DYING = """
import os
from multiprocessing import forkserver
from pipeline.workers.process import start_fork_server

start_fork_server()
forkserver.connect_to_new_process([os.pipe()[0]])
os._exit(0)
"""


def test_a_parent_that_dies_while_it_starts_a_worker_leaves_no_traceback() -> None:
    """As after `kill -9` of `tim launch`. The pipe to standard error is open until the fork server and the worker have ended."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", DYING], env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
