"""Two machines: network namespaces with a cable between them. One is lost, and the run goes on when both are back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.training.metrics import read_rows
from tests import REPOSITORY
from tests.distributed import jobs
from tests.distributed.namespaces import ADDRESSES, two_namespaces

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 14, lr: 1e-3, zero: 2}
loader: {workers: 0}
checkpoint: {every: 3}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    context = two_namespaces()
    try:
        names = context.__enter__()
    except RuntimeError as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        yield names
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def config(figures: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(f"corpus: {figures}\nrun_dir: {tmp_path / 'run'}\n{CONFIG}")
    return tmp_path / "run.yaml"


def check_story(run: Path, *, lost_after: int) -> None:
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert len({row["ids_digest"] for row in rows}) == 14
    assert rows[-1]["images"] > rows[lost_after]["images"]
    assert (run / "latest").read_text() == "step-000014\n"


def test_a_lost_machine_and_the_way_back(namespaces: tuple[str, str], config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = jobs.start_ranks("tests.distributed.node_worker", "29517", *namespaces, "train", str(config), log=log)
    jobs.wait_for_row(run, 5, job, log=log)
    job.kill([job.pids[1]])
    met = dict(re.findall(r"^machine at (\S+): rank (\d), store at \S+$", log.read_text(), re.MULTILINE))
    assert set(met) == set(ADDRESSES)
    assert set(met.values()) == {"0", "1"}

    log.write_text("")
    jobs.run_ranks("tests.distributed.node_worker", "29518", *namespaces, "train", str(config), log=log)
    assert re.search(r"step-00000[36]|step-00001\d", log.read_text()), "it resumes"
    check_story(run, lost_after=5)


@pytest.mark.soak
@pytest.mark.parametrize("numbered", [True, False])
def test_a_lost_launcher_and_the_way_back(namespaces: tuple[str, str], config: Path, tmp_path: Path, numbered: bool) -> None:
    """`tim launch` on both machines, with node ranks and without."""
    run, logs = tmp_path / "run", [tmp_path / "log-0", tmp_path / "log-1"]

    def start() -> list[subprocess.Popen[bytes]]:
        place = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-endpoint", f"{ADDRESSES[0]}:29519"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        started = []
        for rank, (namespace, log) in enumerate(zip(namespaces, logs, strict=True)):
            number = ["--node-rank", str(rank)] if numbered else []
            command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "launch.cli", "launch", str(config), *place, *number]
            with log.open("ab") as output:
                started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output))
        return started

    first, second = start()
    jobs.wait_for_row(run, 5, first, log=logs[0])
    second.send_signal(signal.SIGKILL)  # `ip netns exec` has become tim
    assert first.wait(jobs.PATIENCE) == 1, logs[0].read_text()
    said = logs[0].read_text() + logs[1].read_text()
    assert re.search(r"^rank \d on \S+ lost the connection to another rank in step \d+", said, re.MULTILINE), said
    assert not jobs.workers_of(second.pid)

    assert [job.wait(jobs.PATIENCE) for job in start()] == [0, 0], logs[0].read_text()
    check_story(run, lost_after=5)


@pytest.mark.soak
def test_a_hostfile_starts_both_machines(
    namespaces: tuple[str, str], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a stand-in for ssh, whose hosts are the namespaces. Ctrl-C, then the same command again."""
    ssh, log, run = tmp_path / "bin" / "ssh", tmp_path / "log", tmp_path / "run"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done\nexec ip netns exec "$1" sh -c "$2"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(jobs, "PATIENCE", 600.0)  # three processes import torch one after the other
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{name} slots=1\n" for name in namespaces))
    command = ["launch", str(config), "--hostfile", str(hosts), "--rdzv-endpoint", f"{ADDRESSES[0]}:29520"]
    job = jobs.start(*command, log=log)
    jobs.wait_for_row(run, 3, job, log=log)
    job.send_signal(signal.SIGINT)
    assert job.wait(jobs.PATIENCE) == 75, log.read_text()
    assert re.search(rf"^{namespaces[0]}: SIGINT: finishing step \d+, then saving", log.read_text(), re.MULTILINE), log.read_text()
    job = jobs.start(*command, log=log)
    assert job.wait(jobs.PATIENCE) == 0, log.read_text()
    check_story(run, lost_after=3)
