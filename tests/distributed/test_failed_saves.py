"""A rank that cannot write its part of a checkpoint: the run goes on and tries again, but does not end without its last one."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path

from launch.checkpoints import checkpoint
from launch.training.metrics import read_rows
from tests.distributed import jobs

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 64, num_heads: 2, cap_feat_dim: 16}
train: {steps: 100000, lr: 1.0e-3}
loader: {workers: 0}
checkpoint: {every: 2}
log: {every: 1}
"""
LIMIT = 100_000  # bytes, less than a rank's weights


def test_a_failed_save_is_a_warning_unless_it_is_the_last(figures: Path, tmp_path: Path) -> None:
    config, log, run = (tmp_path / name for name in ("run.yaml", "log", "run"))
    config.write_text(f"corpus: {figures}\nrun_dir: {run}\n{CONFIG}")
    ranks = jobs.start_ranks("launch.cli", "train", str(config), log=log)
    jobs.wait_for_line(r"saved \S+/checkpoints/step-000002\n", ranks, log=log)
    before = resource.prlimit(ranks.pids[1], resource.RLIMIT_FSIZE)
    resource.prlimit(ranks.pids[1], resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    warning = jobs.wait_for_line(r"warning: step (\d+) was not saved: \S+: File too large \(EFBIG\); the run goes on", ranks, log=log)
    failed = int(warning[1])
    assert re.search(rf"/checkpoints/step-{failed:06d}\.tmp/\w+-00001\.\w+: File too large \(EFBIG\)", log.read_text())
    jobs.wait_for_row(run, failed + 3, ranks, log=log)
    resource.prlimit(ranks.pids[1], resource.RLIMIT_FSIZE, before)
    last_failure = max(map(int, re.findall(r"step (\d+) was not saved", log.read_text())))
    deadline = time.monotonic() + jobs.PATIENCE
    while checkpoint.step_of(checkpoint.step_folders(run)[-1]) <= last_failure + 2:  # rank 0 has all checkpoints until they are replaced
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    ranks.kill()
    found = checkpoint.newest(run)
    assert found is not None

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    last = found.metadata.step + 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        job = jobs.start("train", str(config), f"train.steps={last}", log=tmp_path / "end")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert job.wait(jobs.PATIENCE) == 1
    said = (tmp_path / "end").read_text()
    assert re.search(r"error: the last step was not saved: \S+: File too large \(EFBIG\); then run the same command again", said), said
    assert "Traceback" not in said
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == last
    assert not (run / "model").exists()
    assert checkpoint.find(run).folder == found.folder
