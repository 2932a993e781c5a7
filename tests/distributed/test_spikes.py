"""With a learning rate that is far too high two ranks go back together, and give up. With a lower one they go on as if unbroken."""

from __future__ import annotations

import re
from pathlib import Path

from launch.guards.loss_spikes import MIN_STEPS
from launch.training.metrics import read_rows
from tests.distributed import jobs

SAVED = MIN_STEPS + 8
CONFIG = f"""\
plan: {{max_tokens: 64, tokens_per_pack: 64, packs_per_step: 2}}
network:
  params: {{patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
objective: {{diffusion_share: 1.0, consistency_share: 0.0}}
train: {{steps: {SAVED + 3}, lr: 1.0e-4, warmup: 0, zero: 2, spike: rollback, max_rollbacks: 1}}
loader: {{workers: 0}}
checkpoint: {{every: {SAVED}}}
log: {{every: 1}}
"""
COLUMNS = ["step", "ids_digest", "loss", "grad_norm", "lr"]


def test_two_ranks_go_back_together(figures: Path, tmp_path: Path) -> None:
    config, log, broken, unbroken = (tmp_path / name for name in ("run.yaml", "log", "broken", "unbroken"))
    config.write_text(f"corpus: {figures}\n{CONFIG}")
    command = ("launch.cli", "train", str(config))
    jobs.run_ranks(*command, f"run_dir={broken}", f"train.steps={SAVED}", log=log)
    codes = jobs.exit_codes(*command, f"run_dir={broken}", "train.lr=1000", f"train.steps={SAVED + 100}", log=log)
    assert 1 in codes
    output = log.read_text()
    back = rf"warning: loss spike at step \d+: loss_diffusion .*; went back to the weights of step {SAVED}; training goes on with step \d+"
    assert len(re.findall(rf"^{back}$", output, re.MULTILINE)) == 1
    assert len(re.findall(r"error: loss spike at step \d+ after 1 rollbacks: .*: lower train\.lr", output)) == 1
    assert "Traceback" not in output
    rows = read_rows(broken / "metrics.jsonl")
    assert rows[-1]["rollbacks"] == 1
    assert (broken / "latest").read_text() == f"step-{SAVED:06d}\n"

    for run in (broken, unbroken):
        jobs.run_ranks(*command, f"run_dir={run}", log=log)
    assert jobs.story(broken, columns=COLUMNS) == jobs.story(unbroken, columns=COLUMNS)
    assert [row[0] for row in jobs.story(broken, columns=COLUMNS)] == list(range(1, SAVED + 4))
