"""`tim train` under the launchers of others: two ranks each, and a run that the next one continues."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.training.metrics import read_rows
from tests import REPOSITORY
from tests.distributed import jobs

pytestmark = pytest.mark.soak
CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2, lr: 1e-3, zero: 2}
loader: {workers: 0}
log: {every: 1}
"""
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch.cli"],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
        *("--dynamo_backend=no", "--multi_gpu", "--module", "launch.cli"),
    ],
    "deepspeed": [sys.executable, str(BIN / "deepspeed"), "--num_accelerators=2", "--module", "launch.cli"],
}


def test_three_launchers_share_a_run(figures: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "run.yaml").write_text(f"corpus: {figures}\nrun_dir: {run}\n{CONFIG}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    for number, (name, launcher) in enumerate(LAUNCHERS.items(), start=1):
        command = [*launcher, "train", str(tmp_path / "run.yaml"), f"train.steps={2 * number}"]
        with log.open("ab") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=3 * jobs.PATIENCE, check=False)
        assert done.returncode == 0, f"{name}: {log.read_text()}"
        said = log.read_text()
        assert said.count("2 processes on CPU") == number, f"{name}: {said}"
        assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(1, 2 * number + 1))
