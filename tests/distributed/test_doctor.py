"""`tim doctor --nodes` on two ranks: it names the slow one."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest

from launch.hardware.nodes import RankSpeed, report_of
from tests.distributed import jobs


def test_the_slow_rank_has_a_name(tmp_path: Path) -> None:
    result = tmp_path / "report.json"
    jobs.run_ranks("tests.distributed.doctor_worker", str(result), log=tmp_path / "log")
    slowed, real = json.loads(result.read_text())
    assert len(slowed["slow"]) == 1
    assert "rank 1: matmul 0.0003 TFLOP/s, 46% of the median" in slowed["slow"][0]
    assert [each["rank"] for each in real["ranks"]] == [0, 1]
    for each in real["ranks"]:
        assert each["rates"].keys() == {"matmul", "memory", "all-reduce", "neighbours"}
        assert all(rate > 1e6 for rate in each["rates"].values())
    assert real["differences"] == []


def speed(rank: int, *, clock: float = 0.0, **rates: float) -> RankSpeed:
    return RankSpeed(rank, f"node{rank // 2}", rank % 2, dict(rates), clock, {"torch": "2.14" if rank < 4 else "2.13"})


def test_nodes_are_compared_with_the_median() -> None:
    report = report_of([speed(rank, matmul=1e15 if rank != 3 else 8e14, memory=3e12, clock=5.0 * (rank == 5)) for rank in range(6)])
    assert report.slow == ("node1 rank 3: matmul 800 TFLOP/s, 80% of the median",)
    assert report.differences == ("torch: 2.14 on node0 node1, 2.13 on node2", "clock: node2 is +5.0 s from the median: synchronise clocks")


@pytest.mark.soak
def test_a_busy_processor_makes_a_rank_slow(tmp_path: Path) -> None:
    """Rank 1 shares its processor with other processes."""
    result = tmp_path / "report.json"
    jobs.run_ranks("tests.distributed.doctor_worker", str(result), "busy", log=tmp_path / "log")
    _, real = json.loads(result.read_text())
    assert any("rank 1: matmul" in line for line in real["slow"]), real


@pytest.mark.soak
def test_the_command_starts_its_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = jobs.start("doctor", "--nodes", "--nproc-per-node", "2", "--json", log=log)
    assert job.wait(timeout=300) in (0, 1)  # the machine may be busy
    report = json.loads(next(line for line in log.read_text().splitlines() if line.startswith('{"ranks"')))
    assert len(report["ranks"]) == 2


@pytest.mark.soak
def test_two_machines_both_have_the_report(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["doctor", "--nodes", "--nnodes", "2", "--rdzv-endpoint", endpoint, "--json"]
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    started = [jobs.start(*command, "--node-rank", str(rank), log=log) for rank, log in enumerate(logs)]
    codes = [job.wait(timeout=300) for job in started]
    assert codes in ([0, 0], [1, 1]), logs[0].read_text()  # the machine may be busy
    reports = [next(line for line in log.read_text().splitlines() if line.startswith('{"ranks"')) for log in logs]
    assert reports[0] == reports[1]
    assert len(json.loads(reports[0])["ranks"]) == 2


@pytest.mark.soak
def test_ranks_end_with_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = jobs.start("doctor", "--nodes", "--nproc-per-node", "2", log=log)
    while not jobs.workers_of(job.pid):
        assert job.poll() is None, log.read_text()
        time.sleep(0.05)
    assert jobs.kill_and_watch(job) == []
