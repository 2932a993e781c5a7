"""A node is lost: the run goes on with fewer ranks, then with more, and under other ZeRO stages. Its steps are those of an unbroken run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.checkpoints import checkpoint
from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.training.metrics import read_rows
from launch.training.planning import plan_from_checkpoint
from launch.training.train import train
from tests.distributed import jobs

LR = 1e-3
CONFIG = f"""\
plan: {{max_tokens: 64, tokens_per_pack: 128, packs_per_step: 3}}
network:
  params: {{patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {{steps: 1000, lr: {LR}, zero: 1, ema: 0.9}}
loader: {{workers: 0}}
checkpoint: {{every: 2}}
log: {{every: 1}}
"""
PLANNED = ["step", "ids_digest", "first_ids", "lr", "images", "tokens"]
COMPUTED = ["loss", "loss_diffusion", "loss_consistency", "loss_transition", "grad_norm"]


def test_a_run_goes_on_with_any_number_of_ranks(figures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, log, unbroken, broken = (tmp_path / name for name in ("run.yaml", "log", "unbroken", "broken"))
    config.write_text(f"corpus: {figures}\nrun_dir: {broken}\n{CONFIG}")

    ranks = jobs.start_ranks("launch.cli", "train", str(config), log=log)
    jobs.wait_for_row(broken, 5, ranks, log=log)
    ranks.kill()
    assert "plan.packs_per_step 3 is not a multiple of 2 processes: they may be idle for up to 25% of the time" in log.read_text()

    found = checkpoint.newest(broken)
    assert found is not None
    killed = found.metadata.step
    assert killed >= 4
    last = killed + 8
    train(load_config(config, overrides=[f"train.steps={last}", f"run_dir={unbroken}"]), quiet=True)

    capfd.readouterr()
    train(load_config(config, overrides=[f"train.steps={killed + 3}"]))
    said = capfd.readouterr().err
    assert f"continuing from {found.folder}, written by 2 processes: samples and random draws of each step stay the same" in said
    assert "is not a multiple of" not in said

    more = [f"train.steps={killed + 6}", "train.zero=3"]
    jobs.run_ranks("launch.cli", "train", str(config), *more, log=log)
    assert ", written by 1 process" in log.read_text()
    assert "changed since: train.zero: 1 → 3" in log.read_text()
    planner = plan_from_checkpoint(broken, arguments=[])

    train(load_config(config, overrides=[f"train.steps={last}", "train.zero=2"]), quiet=True)

    assert [row[0] for row in jobs.story(broken, columns=PLANNED)] == list(range(1, last + 1))
    assert jobs.story(broken, columns=PLANNED) == jobs.story(unbroken, columns=PLANNED)
    first_ids = read_rows(broken / "metrics.jsonl")[killed + 6]["first_ids"]
    assert first_ids == list(planner.next_step().ids[: len(first_ids)])
    for one, other in zip(jobs.story(broken, columns=COMPUTED), jobs.story(unbroken, columns=COMPUTED), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    ends = [checkpoint.find(run) for run in (broken, unbroken)]
    assert [found.metadata.world_size for found in ends] == [1, 1]
    for ema in (False, True):
        weights, expected = (checkpoint.consolidate(found.folder, ema=ema) for found in ends)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=0.1 * LR)

    manifest = ends[0].folder / checkpoint.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 1}))
    with pytest.raises(ConfigError, match=r"was written by an earlier version.*`tim export` can read its weights"):
        train(load_config(config, overrides=[f"train.steps={last + 1}"]), quiet=True)
