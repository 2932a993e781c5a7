"""A rank dies or hangs: it is named, all ranks start again from the checkpoint, and the steps are those of an unbroken run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.distributed import jobs

STEPS = 15
CONFIG = f"""\
plan: {{max_tokens: 64, tokens_per_pack: 64, packs_per_step: 2}}
network:
  params: {{patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {{steps: {STEPS}, lr: 1e-3, zero: 2}}
loader: {{workers: 1}}
checkpoint: {{every: 3}}
log: {{every: 1}}
"""
COLUMNS = ["step", "loss", "loss_diffusion", "loss_consistency", "loss_transition", "grad_norm", "lr", "images", "tokens", "ids_digest"]


@pytest.fixture(scope="module")
def unbroken(figures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[object]]:
    """What the run writes if nothing happens to it."""
    folder = tmp_path_factory.mktemp("unbroken")
    jobs.run_ranks("launch.cli", "train", str(write_config(folder, figures)), log=folder / "log")
    return jobs.story(folder / "run", columns=COLUMNS)


def write_config(folder: Path, corpus: Path) -> Path:
    (folder / "run.yaml").write_text(f"corpus: {corpus}\nrun_dir: {folder / 'run'}\n{CONFIG}")
    return folder / "run.yaml"


def test_ranks_that_die_or_hang_are_named_and_all_start_again(figures: Path, tmp_path: Path, unbroken: list[list[object]]) -> None:
    config, log, run = write_config(tmp_path, figures), tmp_path / "log", tmp_path / "run"
    limits = "train.hang_timeout={data: 15, compute: 15, collective: 15, save: 15}"
    job = jobs.start("launch", str(config), "--nproc-per-node", "2", "--max-restarts", "1", limits, log=log)
    first = jobs.wait_for_rank(run, after=4, job=job, log=log)
    os.kill(first.pid, signal.SIGKILL)
    second = jobs.wait_for_rank(run, after=8, attempt=1, job=job, log=log)
    os.kill(second.pid, signal.SIGSTOP)
    assert job.wait(jobs.PATIENCE) == 1, log.read_text()
    assert jobs.workers_of(job.pid) == []

    output = log.read_text()
    killed, stopped = [line for line in output.splitlines() if line.startswith("rank ")]
    assert killed.startswith(f"rank 1 on {first.host} was killed by signal 9 (SIGKILL) in step ")
    assert output.count("`dmesg | grep -i oom`") == 1
    hangs = f"rank 1 on {first.host} hangs for more than 15 s (train.hang_timeout), its process is stopped (SIGSTOP): in step "
    assert stopped.startswith(hangs)
    (folder,) = (run / "stacks").iterdir()
    assert f"Python stacks of the ranks of this machine: {folder}" in output
    for rank in (0, 1):
        text = (folder / f"rank-{rank:05d}.txt").read_text()
        assert "take_step" in text or "save" in text or "agree" in text
    assert re.search(r"^starting all ranks again from checkpoint step-0000\d\d \(restart 1 of 1\)$", output, re.MULTILINE)
    assert "error: training ended with exit code 1" in output
    for noise in ("gloo", "Connection", "Traceback", "unexpected error"):
        assert noise not in output

    jobs.run_ranks("launch.cli", "train", str(config), log=log)
    assert jobs.story(run, columns=COLUMNS) == unbroken
