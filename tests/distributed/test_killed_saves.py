"""Both ranks are killed with -9 in the middle of a background save. The run goes on from the last whole checkpoint, as if unbroken."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from launch.checkpoints import checkpoint
from tests.distributed import jobs

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 4}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 64, num_heads: 2, cap_feat_dim: 16}
loader: {workers: 0}
checkpoint: {every: 2}
log: {every: 1}
"""
COLUMNS = ["step", "ids_digest", "loss", "loss_diffusion", "loss_consistency", "loss_transition", "grad_norm", "lr", "images"]


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
                return
            for pid in ranks.pids:
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError(f"no save was caught: {log.read_text()}")


def check_kills(figures: Path, folder: Path, *, zero: int, kills: int) -> None:
    config, log, unbroken, broken = (folder / name for name in ("run.yaml", "log", "unbroken", "broken"))
    config.write_text(f"corpus: {figures}\n{CONFIG}train: {{steps: 2000, lr: 1.0e-3, zero: {zero}, ema: 0.9}}\n")
    done, found = 0, None
    for _ in range(kills):
        ranks = jobs.start_ranks("launch.cli", "train", str(config), f"run_dir={broken}", log=log)
        kill_in_a_save(ranks, broken, after=done + 2, log=log)
        found = checkpoint.newest(broken)
        assert found is not None
        assert (found.skipped, found.metadata.world_size) == ((), 2)
        assert found.metadata.step >= done + 2
        assert list((broken / "checkpoints").glob("*.tmp"))
        done = found.metadata.step
    for run in (broken, unbroken):
        jobs.run_ranks("launch.cli", "train", str(config), f"run_dir={run}", f"train.steps={done + 3}", log=log)
    assert found is not None
    assert f"continuing from {found.folder}\n" in log.read_text()
    assert not list((broken / "checkpoints").glob("*.tmp"))
    assert jobs.story(broken, columns=COLUMNS) == jobs.story(unbroken, columns=COLUMNS)
    ends = [checkpoint.find(run, step=done + 3).folder for run in (broken, unbroken)]
    for ema in (False, True):
        one, other = (checkpoint.consolidate(end, ema=ema) for end in ends)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_inside_a_save_leaves_the_last_whole_checkpoint(figures: Path, tmp_path: Path) -> None:
    check_kills(figures, tmp_path, zero=2, kills=2)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_twenty_kills_inside_saves(figures: Path, tmp_path: Path, zero: int) -> None:
    check_kills(figures, tmp_path, zero=zero, kills=20)
