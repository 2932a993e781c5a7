"""Kill -9 of one rank, of all ranks, of the launcher and inside a save, at random: the run goes on as if nothing had happened to it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.checkpoints import checkpoint
from tests.distributed import jobs

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 64, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 64, num_heads: 2, cap_feat_dim: 16}
loader: {workers: 0}
checkpoint: {every: 2}
log: {every: 1}
"""
COLUMNS = ["step", "ids_digest", "loss", "loss_diffusion", "loss_consistency", "loss_transition", "grad_norm", "lr", "images"]
KINDS = ("one rank", "all ranks", "launcher", "save")


def wait_for_save(job: subprocess.Popen[bytes] | jobs.RankProcesses, run: Path, *, after: int, log: Path) -> None:
    """Wait until a checkpoint later than step `after` is there."""
    deadline = time.monotonic() + jobs.PATIENCE
    while not any(checkpoint.step_of(folder) > after for folder in checkpoint.step_folders(run)):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def kill_in_a_save(ranks: jobs.RankProcesses, run: Path, *, after: int, log: Path) -> None:
    """Stop both ranks while a save later than step `after` is in progress, then kill them."""
    folder = run / "checkpoints"
    deadline = time.monotonic() + jobs.PATIENCE
    while time.monotonic() < deadline:
        assert ranks.poll() is None, log.read_text()
        if any(int(path.name[5:11]) > after for path in folder.glob("step-*[0-9].tmp")):
            for pid in ranks.pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)  # until all threads have stopped
            if any(folder.glob("step-*[0-9].tmp")):
                ranks.kill()
                assert list(folder.glob("*.tmp"))
                return
            for pid in ranks.pids:
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError(f"no save was caught: {log.read_text()}")


def start_and_kill(kind: str, config: Path, run: Path, *, after: int, rng: np.random.Generator, log: Path) -> None:
    """Train until a checkpoint is saved that is later than step `after`, and kill at random within some steps."""
    arguments = (str(config), f"run_dir={run}")
    if kind == "launcher":
        job = jobs.start("launch", *arguments, "--nproc-per-node", "2", log=log)
        wait_for_save(job, run, after=after, log=log)
        time.sleep(rng.uniform(0, 0.3))
        assert jobs.kill_and_watch(job) == []
        return
    ranks = jobs.start_ranks("launch.cli", "train", *arguments, log=log)
    if kind == "save":
        kill_in_a_save(ranks, run, after=after + 2, log=log)
        return
    wait_for_save(ranks, run, after=after, log=log)
    time.sleep(rng.uniform(0, 0.3))
    ranks.kill(ranks.pids[int(rng.integers(2)) :][:1] if kind == "one rank" else ranks.pids)


def check_kills(figures: Path, folder: Path, *, zero: int, kinds: Sequence[str]) -> None:
    config, log, unbroken, broken = (folder / name for name in ("run.yaml", "log", "unbroken", "broken"))
    config.write_text(f"corpus: {figures}\n{CONFIG}train: {{steps: 100000, lr: 1.0e-3, zero: {zero}, ema: 0.9}}\n")
    done, rng = 0, np.random.default_rng(zero)
    for kind in kinds:
        start_and_kill(kind, config, broken, after=done, rng=rng, log=log)
        found = checkpoint.newest(broken)
        assert found is not None
        assert (found.skipped, found.metadata.world_size) == ((), 2)
        assert found.metadata.step >= done + 2
        done = found.metadata.step
    for run in (broken, unbroken):
        jobs.run_ranks("launch.cli", "train", str(config), f"run_dir={run}", f"train.steps={done + 3}", log=log)
    assert log.read_text().count("continuing from ") == len(kinds)
    assert not list((broken / "checkpoints").glob("*.tmp"))
    assert jobs.story(broken, columns=COLUMNS) == jobs.story(unbroken, columns=COLUMNS)
    ends = [checkpoint.find(run, step=done + 3).folder for run in (broken, unbroken)]
    for ema in (False, True):
        one, other = (checkpoint.consolidate(end, ema=ema) for end in ends)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("zero", "kinds"), [(1, ("save", "one rank")), (2, ("all ranks", "save")), (3, ("one rank", "save"))])
def test_two_kills_change_nothing(figures: Path, tmp_path: Path, zero: int, kinds: tuple[str, ...]) -> None:
    check_kills(figures, tmp_path, zero=zero, kinds=kinds)  # the launcher is killed in test_photos


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills_change_nothing(figures: Path, tmp_path: Path, zero: int, kind: str) -> None:
    check_kills(figures, tmp_path, zero=zero, kinds=[kind] * 20)
