"""A polite signal to the launcher: two ZeRO-3 ranks save, leave with 75, and go on with the sample that comes next."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.config.load import load_config
from launch.config.schema import Config
from launch.training.metrics import read_rows
from pipeline.corpus.corpus import Corpus
from pipeline.planning.planner import Planner
from tests.distributed import jobs

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 3}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 15, lr: 1e-3, zero: 3, precision: bf16}
loader: {workers: 0}
checkpoint: {every: 1000}
log: {every: 1}
"""


@pytest.fixture
def config(figures: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(f"corpus: {figures}\nrun_dir: {tmp_path / 'run'}\n{CONFIG}")
    return tmp_path / "run.yaml"


def planned_digests(config: Config) -> list[str]:
    """What `ids_digest` must be after each step, from the plan alone."""
    planner = Planner(
        [Corpus.open(config.corpus[0].path)],
        plan=config.plan,
        seed=config.seed,
        width=config.network.params.hidden_size,
        diffusion_share=config.objective.diffusion_share,
        consistency_share=config.objective.consistency_share,
        caption_dropout=config.text.caption_dropout,
    )
    digests, digest = [], ""
    for _ in range(config.train.steps):
        digest = hashlib.sha256("\n".join([digest, *planner.next_step().ids]).encode()).hexdigest()[:16]
        digests.append(digest)
    return digests


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The surroundings of a Slurm job, and a stand-in for `scontrol` that records its arguments in the returned file.

    The real one ends the job: it also records whether the run still has its lock.
    """
    command, calls = tmp_path / "bin/scontrol", tmp_path / "calls"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ ! -e {tmp_path}/run/lock ] || echo locked >> {calls}\necho "$@" >> {calls}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return calls


def test_a_signal_saves_and_the_run_goes_on(config: Path, tmp_path: Path, slurm: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["launch", str(config), "--nproc-per-node", "2"]
    job = jobs.start(*command, log=log)
    jobs.wait_for_row(run, 2, job, log=log)
    job.send_signal(signal.SIGUSR1)
    jobs.wait_for_line(r"saved .*/step-\d+", job, log=log)
    job.send_signal(signal.SIGTERM)
    assert job.wait(jobs.PATIENCE) == 75, log.read_text()
    said = log.read_text()
    assert len(re.findall(r"^SIGUSR1: finishing step \d+, then saving$", said, re.MULTILINE)) == 1
    in_hand = int(re.findall(r"^SIGTERM: finishing step (\d+), then saving$", said, re.MULTILINE)[0])
    assert slurm.read_text() == "requeue 77\n"
    assert "requeued Slurm job 77" in said
    assert jobs.workers_of(job.pid) == []
    stopped_at = read_rows(run / "metrics.jsonl")[-1]["step"]
    assert in_hand - 1 <= stopped_at <= in_hand < 15, "the signal costs the step in hand at most"
    assert (run / "latest").read_text() == f"step-{stopped_at:06d}\n"
    assert not (run / "lock").exists()

    jobs.run_ranks("launch.cli", "train", str(config), log=log)
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert [row["ids_digest"] for row in rows] == planned_digests(load_config(config))
    assert rows[-1]["skipped_steps"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_ctrl_c_twice_stops_without_saving(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    large = ["network.params.depth=4", "network.params.hidden_size=256", "plan.packs_per_step=16", "train.precision=fp32"]
    job = jobs.start("launch", str(config), "--nproc-per-node", "2", *large, "train.zero=1", log=log)
    jobs.wait_for_rank(run, after=1, job=job, log=log)
    job.send_signal(signal.SIGINT)
    jobs.wait_for_line(r"SIGINT: finishing step \d+, then saving; press Ctrl-C again to stop without saving", job, log=log)
    time.sleep(0.7)  # a terminal sends the first press to the ranks, too
    job.send_signal(signal.SIGINT)
    assert job.wait(jobs.PATIENCE) == 130, log.read_text()
    said = log.read_text()
    assert said.count("SIGINT: stopping without saving") == 1
    assert "Traceback" not in said
    assert jobs.workers_of(job.pid) == []
    assert not list((run / "checkpoints").glob("*"))


def test_a_checkpoint_of_another_optimizer_is_refused_in_one_line(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # DeepSpeed's logger keeps the stream of the test that imported it first
    short = ["train", str(config), "train.zero=1", "train.precision=fp32"]
    assert main([*short, "train.steps=2"]) == 0
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*short, "train.steps=3", "train.optimizer=muon"])
    said = capfd.readouterr().err
    assert "was written with train.optimizer=adamw, not muon: resume with the same optimizer" in said
    assert "Traceback" not in said
