"""`tim launch --slurm` under a real Slurm: two minutes before its time limit the run saves, and the job goes on by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.training.metrics import read_rows
from tests import REPOSITORY
from tests.distributed import jobs
from tests.distributed.slurm_cluster import slurm_cluster

pytestmark = pytest.mark.soak
PATIENCE = 900.0  # seconds
CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 3}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 100000, lr: 1e-3, zero: 2}
loader: {workers: 0}
checkpoint: {every: 100000}
log: {every: 1}
cluster: {gres: null, cpus: 1, env: {OMP_NUM_THREADS: "1", DS_ACCELERATOR: cpu}, setup: [echo set up]}
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "slurm").mkdir()
    context = slurm_cluster(tmp_path / "slurm")
    try:
        config = context.__enter__()
    except RuntimeError as error:
        context.__exit__(None, None, None)
        pytest.skip(f"no Slurm: {error}")
    monkeypatch.setenv("SLURM_CONF", str(config))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    try:
        yield
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], check=False)
        context.__exit__(None, None, None)


def launch(config: Path, *overrides: str) -> dict[str, str]:
    command = [sys.executable, "-m", "launch.cli", "launch", str(config), "--nproc-per-node", "1", "--slurm", "--json", *overrides]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def states(job: str) -> str:
    """The job's line of `squeue`: its state; empty once it is over."""
    return subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False).stdout


def wait_for(pattern: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not log.is_file() or not re.search(pattern, log.read_text(), re.MULTILINE):
        assert time.monotonic() < deadline, f"no {pattern}: {log.read_text() if log.is_file() else ''}"
        time.sleep(0.5)


def test_the_time_limit_and_scancel(slurm: None, figures: Path, tmp_path: Path) -> None:
    """The limit of six minutes leaves four for start and run; scancel ends it for good."""
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(f"corpus: {figures}\nrun_dir: {run}\n{CONFIG}")
    job = launch(config, "cluster.time='6:00'")["job"]
    log = run / "slurm" / f"{job}.log"
    wait_for(rf"^requeued Slurm job {job}\n(.*\n)*.*stopped by a signal, checkpoint saved$", log)
    said = log.read_text()
    assert said.startswith("set up\n")
    stopped = re.search(r"^stopped by a signal after step (\d+): run the same command again", said, re.MULTILINE)
    assert stopped is not None, said
    assert (run / "latest").read_text() == f"step-{int(stopped[1]):06d}\n"

    assert "was killed" not in said, "Slurm's second SIGTERM, for the requeue, changes nothing"
    wait_for(rf"^continuing from .*/step-{int(stopped[1]):06d}\nstep \d+/", log)
    assert log.read_text().count("set up\n") == 2, "Slurm has started it again, and it writes to the same log"
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))

    subprocess.run(["scancel", job], check=True)
    wait_for(rf"^Slurm job {job} is \w+, by scancel or after its time: not requeued$", log)
    deadline = time.monotonic() + jobs.PATIENCE
    while states(job).strip():
        assert time.monotonic() < deadline, states(job)
        time.sleep(0.5)
    time.sleep(8)  # as long as a requeued job waits
    assert not states(job).strip()
    assert "SLURM_JOB_ID" not in os.environ
