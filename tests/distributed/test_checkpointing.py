"""Activation checkpointing under every ZeRO stage, on two real ranks, gives the gradients of one process without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("checkpointing_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(report) == {"1-1", "2-2", "3-1"}
        assert max(report.values()) < 1e-6, report
