"""A run on two ranks is planned anew under another ZeRO stage, goes on in one process, and gives its weights to new runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.checkpoints import history
from launch.config.load import load_config
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.distributed import jobs

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2, lr: 1e-3, zero: 2, ema: 0.9}
loader: {workers: 0}
log: {every: 1}
"""


def test_replanned_and_begun_on_two_ranks_as_in_one_process(figures: Path, tmp_path: Path) -> None:
    config, run, log = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "log"
    config.write_text(f"corpus: {figures}\nrun_dir: {run}\n{CONFIG}")
    jobs.run_ranks("launch.cli", "train", str(config), log=log)
    changed = ["plan.tokens_per_pack=192", "train.zero=3"]
    jobs.run_ranks("launch.cli", "train", str(config), "--replan", *changed, "train.steps=4", log=log)
    line = "step 2: replanned, because plan.tokens_per_pack was 128 and is 192"
    assert log.read_text().count(line) == 1
    assert [str(replan) for replan in history.read(run).replans] == [line]
    train(load_config(config, overrides=[changed[0], "train.steps=6", "train.zero=1"]), quiet=True)
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert sum(row["tokens"] for row in rows[2:]) > 2 * 1.3 * sum(row["tokens"] for row in rows[:2])

    new = [f"train.init={run}", "train.warmup=0"]
    jobs.run_ranks("launch.cli", "train", str(config), f"run_dir={tmp_path / 'two'}", "train.zero=3", *new, log=log)
    train(load_config(config, overrides=[f"run_dir={tmp_path / 'one'}", *new]), quiet=True)
    train(load_config(config, overrides=[f"run_dir={tmp_path / 'random'}", new[1]]), quiet=True)
    two, one, random = ([row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("two", "one", "random"))
    assert two == pytest.approx(one, rel=2e-3)
    assert two[0] != pytest.approx(random[0], rel=2e-3)
    begun = history.read(tmp_path / "two").init
    assert begun is not None
    assert begun.path == str(run)
