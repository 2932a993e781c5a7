"""The supervisor with real processes in place of ranks: who is blamed, what is said, and whether the ranks start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config.run_sections import HANG_LIMITS, TrainConfig
from launch.distributed import supervisor as module
from launch.distributed.heartbeat import (
    DUMP_SIGNAL,
    LOST_CONNECTION,
    SECTIONS,
    Heartbeat,
    RankState,
    read_state,
    remove_states,
    stacks_path,
    state_path,
)
from launch.distributed.stacks import nccl_environment, write_stacks
from launch.distributed.supervisor import Supervisor
from tests.processes import group_runs

HOST = socket.gethostname()
SLEEP = "import time; time.sleep(600)"
KEYS = tuple(f"photos/{number:09d}" for number in range(12))
GROUP = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"


@contextmanager
def processes(*programs: str) -> Iterator[dict[int, int]]:
    """Python programs as ranks 0, 1, …, each the leader of a process group, as torchrun starts them. Yields their pids."""
    started = [subprocess.Popen([sys.executable, "-c", program], start_new_session=True) for program in programs]
    try:
        yield {rank: process.pid for rank, process in enumerate(started)}
    finally:
        for process in started:
            process.kill()
            process.wait()


def write_state(run: Path, rank: int, pid: int, **fields: object) -> None:
    """What a rank would have written."""
    heartbeat = Heartbeat()
    with heartbeat.opened(run, rank=rank):
        pass
    with state_path(run, rank).open("r+b") as file:
        heartbeat._file = file.fileno()
        heartbeat._write(replace(RankState(rank=rank, host=HOST, pid=pid, since=time.time()), **fields))  # pyright: ignore[reportArgumentType]


def watch_to_the_end(supervisor: Supervisor, pids: dict[int, int]) -> bool:
    deadline = time.monotonic() + 60
    while supervisor.watch(pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return supervisor.conclude()


def is_gone(group: int) -> bool:
    """Whether a process group ends within seconds."""
    for _ in range(1000):
        if not group_runs(group):
            return True
        time.sleep(0.01)
    return False


def exits(code: int) -> str:
    return f"import sys; sys.exit({code})"


@pytest.mark.parametrize("code", [2, 75, 130])
def test_explained_exits_are_not_restarted(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor(run_dir=None, limits={}, max_restarts=3)
    with processes(exits(code), exits(code)) as pids:
        assert not watch_to_the_end(supervisor, pids)
    assert supervisor.exit_code == code
    assert capfd.readouterr().err == ""


def test_a_rank_that_has_stopped_waits_for_those_that_still_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 closes trackers and requeues the job."""
    monkeypatch.setattr(module, "GRACE_AFTER_EXIT", 0.0)
    supervisor = Supervisor(run_dir=tmp_path, limits={})
    closes = f"import time; from pathlib import Path; time.sleep(1.5); Path({str(tmp_path / 'closed')!r}).touch(); {exits(75)}"
    with processes(closes, exits(75)) as pids:
        assert not watch_to_the_end(supervisor, pids)
    assert supervisor.exit_code == 75
    assert (tmp_path / "closed").exists()


def test_a_killed_rank_is_the_cause_even_if_another_ended_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor(run_dir=tmp_path, limits={}, max_restarts=1)
    with processes(exits(LOST_CONNECTION), GROUP) as pids:
        write_state(tmp_path, 0, pids[0], section="collective", step=7, ended=True, error="Connection closed by peer", lost=True)
        write_state(tmp_path, 1, pids[1], section="compute", step=7, keys=KEYS[:10], more=2)
        while not supervisor._ends:
            assert supervisor.watch(pids)
        os.kill(pids[1], signal.SIGKILL)
        assert watch_to_the_end(supervisor, pids)
        os.waitpid(pids[1], 0)
        assert is_gone(pids[1])  # with what it has started
    said = capfd.readouterr().err.splitlines()
    work = f"in step 7, in forward, backward and update; samples in hand: {', '.join(KEYS[:8])} and 4 more"
    assert said[0] == f"rank 1 on {HOST} was killed by signal 9 (SIGKILL) {work}"
    assert "fewer loader.workers" in said[1]
    assert said[2] == "starting all ranks again from the beginning: there is no checkpoint yet (restart 1 of 1)"
    assert supervisor.exit_code == 1


def test_an_error_of_its_own_explains_the_lost_connections(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor(run_dir=tmp_path, limits={})
    with processes(exits(LOST_CONNECTION), exits(1)) as pids:
        write_state(tmp_path, 0, pids[0], section="collective", step=3, ended=True, error="Connection closed by peer", lost=True)
        write_state(tmp_path, 1, pids[1], section="data", step=3, ended=True, error="out of memory")
        assert not watch_to_the_end(supervisor, pids)
    assert capfd.readouterr().err == f"rank 1 on {HOST} failed in step 3, waiting for data: its error is above\n"
    assert supervisor.exit_code == 1


def test_a_lost_connection_is_shown_if_no_rank_here_explains_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor(run_dir=tmp_path, limits={})
    with processes(exits(LOST_CONNECTION)) as pids:
        write_state(tmp_path, 0, pids[0], section="collective", step=3, ended=True, error="NCCL timed out", lost=True)
        assert not watch_to_the_end(supervisor, pids)
    said = capfd.readouterr().err
    assert f"rank 0 on {HOST} lost the connection to another rank in step 3, waiting for the other ranks\n  NCCL timed out\n" in said
    assert "another rank is gone, or the network is broken" in said


def test_a_signal_to_the_launcher_prevents_restarts() -> None:
    supervisor = Supervisor(run_dir=None, limits={}, max_restarts=3, stopping=True)
    with processes(SLEEP) as pids:  # as if it came between two attempts: the new ranks are asked to stop
        assert not watch_to_the_end(supervisor, pids)


def test_a_crash_names_its_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    crash = (
        "import os, sys, time; from pathlib import Path; from launch.distributed.heartbeat import HEARTBEAT\n"
        f"with HEARTBEAT.opened(Path({str(tmp_path)!r}), rank=0):\n"
        "    HEARTBEAT.section('compute', step=5); os.kill(os.getpid(), 11)"
    )
    supervisor = Supervisor(run_dir=tmp_path, limits={})
    with processes(crash) as pids:
        assert not watch_to_the_end(supervisor, pids)
    said = capfd.readouterr().err
    assert f"rank 0 on {HOST} was killed by signal 11 (SIGSEGV) in step 5, in forward, backward and update" in said
    assert f"its Python stacks: {stacks_path(tmp_path, 0)}" in said
    assert "Segmentation fault" in stacks_path(tmp_path, 0).read_text()


def test_the_rank_that_keeps_the_others_waiting_is_blamed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_CHECKS", 0.05)
    supervisor = Supervisor(run_dir=tmp_path, limits={**HANG_LIMITS, "data": 0.5, "collective": 0.1}, max_restarts=0)
    with processes(SLEEP, SLEEP) as pids:
        write_state(tmp_path, 0, pids[0], section="collective", step=9)
        write_state(tmp_path, 1, pids[1], section="data", step=9)
        assert not watch_to_the_end(supervisor, pids)
    said = capfd.readouterr().err
    assert f"rank 1 on {HOST} hangs for more than 0.5 s (train.hang_timeout): in step 9, waiting for data" in said
    assert supervisor.exit_code == 1
    (folder,) = (tmp_path / "stacks").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.txt", "rank-00001.txt"]


def test_ranks_that_all_wait_are_not_blamed(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_CHECKS", 0.05)
    supervisor = Supervisor(run_dir=tmp_path, limits={**HANG_LIMITS, "collective": 0.3})
    with processes(SLEEP, SLEEP) as pids:
        for rank in (0, 1):
            write_state(tmp_path, rank, pids[rank], section="collective", step=9)
        assert not watch_to_the_end(supervisor, pids)
    assert "all ranks wait for each other for more than 0.3 s (train.hang_timeout)" in capfd.readouterr().err


def test_ranks_watch_each_other_without_a_launcher(tmp_path: Path) -> None:
    """As under plain torchrun: rank 0 is stopped, rank 1 says so and ends both."""
    program = """
import sys, time
from pathlib import Path
from launch.distributed import self_watch
from launch.distributed.heartbeat import HEARTBEAT, SECTIONS
self_watch.SECONDS_BETWEEN_CHECKS = 0.1
run, rank, section = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with HEARTBEAT.opened(run, rank=rank), self_watch.watched(run, limits=dict.fromkeys(SECTIONS, 2.0)):
    HEARTBEAT.section(section, step=4)
    time.sleep(600)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TIM_LAUNCHER_PID"}
    commands = [[sys.executable, "-c", program, str(tmp_path), str(rank), section] for rank, section in enumerate(("data", "collective"))]
    ranks = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        deadline = time.monotonic() + 60
        while (state := read_state(state_path(tmp_path, 0))) is None or state.section != "data":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(ranks[0].pid, signal.SIGSTOP)
        _, said = ranks[1].communicate(timeout=120)
        assert (ranks[0].wait(60), ranks[1].returncode) == (-signal.SIGKILL, 1)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert said.startswith(f"rank 0 on {HOST} hangs for more than 2 s (train.hang_timeout), its process is stopped (SIGSTOP): in step 4, ")
    assert len(list((tmp_path / "stacks").glob("*/rank-0000[01].txt"))) == 2


def test_stacks_by_signal_where_py_spy_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.distributed.stacks._py_spy", lambda pid: "")
    program = (
        "import time; from pathlib import Path; from launch.distributed.heartbeat import HEARTBEAT\n"
        f"with HEARTBEAT.opened(Path({str(tmp_path)!r}), rank=0):\n"
        "    HEARTBEAT.section('data', step=1); time.sleep(600)"
    )
    with processes(program) as pids:
        deadline = time.monotonic() + 60
        while (state := read_state(state_path(tmp_path, 0))) is None or state.section != "data":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert state.pid == pids[0]
        folder, stacks = write_stacks(tmp_path, [state], nccl=None)
    assert "most recent call first" in stacks[0]
    assert (folder / "rank-00000.txt").read_text() == stacks[0]
    assert DUMP_SIGNAL == signal.SIGUSR2  # torchrun and the training use the others


def test_nccl_records_its_last_collectives(tmp_path: Path) -> None:
    environment = nccl_environment(tmp_path)
    assert int(environment["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0
    os.mkfifo(f"{environment['TORCH_NCCL_DEBUG_INFO_PIPE_FILE']}0.pipe")
    reader = os.open(f"{environment['TORCH_NCCL_DEBUG_INFO_PIPE_FILE']}0.pipe", os.O_RDONLY | os.O_NONBLOCK)
    Path(f"{environment['TORCH_NCCL_DEBUG_INFO_TEMP_FILE']}0").write_bytes(b"trace")
    folder, _ = write_stacks(tmp_path / "run", [], nccl=tmp_path)
    assert os.read(reader, 10) == b"1\n"
    os.close(reader)
    assert (folder / "nccl-rank-0").read_bytes() == b"trace"


def test_limits() -> None:
    assert set(HANG_LIMITS) == set(SECTIONS)
    assert TrainConfig(steps=1).hang_limits == HANG_LIMITS
    assert TrainConfig(steps=1, hang_timeout=60).hang_limits == dict.fromkeys(HANG_LIMITS, 60)
    one = TrainConfig(steps=1, hang_timeout={"data": 0})
    assert one.hang_limits == {**HANG_LIMITS, "data": 0}
    for config in (TrainConfig(steps=1), TrainConfig(steps=1, hang_timeout=60)):
        assert config.group_timeout.total_seconds() > max(config.hang_limits.values())
    assert one.group_timeout.days >= 1


def test_a_heartbeat_keeps_within_its_file(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    with heartbeat.opened(tmp_path, rank=3):
        keys = [f"corpus/ünïcode-{number:050d}" for number in range(1000)]
        heartbeat.section("compute", step=5, keys=keys)
        state = read_state(state_path(tmp_path, 3))
        assert state is not None
        assert list(state.keys) == keys[: len(state.keys)]
        assert len(state.keys) + state.more == 1000
        with heartbeat.collective():
            inside = read_state(state_path(tmp_path, 3))
        assert inside is not None
        assert (inside.section, inside.step, inside.keys) == ("collective", 5, state.keys)
        assert state_path(tmp_path, 3).stat().st_size == 4096
    ended = read_state(state_path(tmp_path, 3))
    assert ended is not None
    assert ended.ended
    remove_states(tmp_path)
    assert read_state(state_path(tmp_path, 3)) is None
    assert list((tmp_path / "ranks").iterdir()) == []
