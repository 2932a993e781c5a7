"""The whole objective (exact derivative, guidance in the target, alignment teacher): two ranks, stopped in between, do what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.distributed import jobs
from tests.tim.test_alignment import radio_weights

STEPS = 6
CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16, z_dim: 128, projector_dim: 32, encoder_depth: 1}
objective:
  derivative: jvp
  guidance: {w_gt: 0.5, interval: [0, 1], after: 1, refresh: 3}
text: {caption_dropout: 0.3}
train: {lr: 1e-2, zero: 2, ema: 0.5}
loader: {workers: 0}
checkpoint: {every: 1000}
log: {every: 1}
"""


@pytest.fixture
def config(figures: Path, tmp_path: Path) -> Path:
    save_file(radio_weights(), tmp_path / "radio.safetensors")
    teacher = f"  alignment: {{kind: radio, path: {tmp_path / 'radio.safetensors'}, weight: 0.5}}\n"
    (tmp_path / "run.yaml").write_text(f"corpus: {figures}\n" + CONFIG.replace("objective:\n", "objective:\n" + teacher))
    return tmp_path / "run.yaml"


def test_two_ranks_that_were_stopped_do_what_one_process_does(config: Path, tmp_path: Path) -> None:
    alone, together, plain = tmp_path / "alone", tmp_path / "together", tmp_path / "plain"
    train(load_config(config, overrides=[f"run_dir={alone}", f"train.steps={STEPS}"]), quiet=True)
    for steps in (3, STEPS):  # at 3 the copy of the average is older than the average
        jobs.run_ranks("launch.cli", "train", str(config), f"run_dir={together}", f"train.steps={steps}", log=tmp_path / "log")
    one, two = read_rows(alone / "metrics.jsonl"), read_rows(together / "metrics.jsonl")
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for expected, row in zip(one, two, strict=True):
        for column in ("loss", "loss_alignment", "grad_norm"):
            assert row[column] == pytest.approx(expected[column], rel=2e-3), (row["step"], column)
    assert one[-1]["loss_alignment"] < one[0]["loss_alignment"]

    overrides = [f"run_dir={plain}", f"train.steps={STEPS}", "objective.guidance=null"]
    train(load_config(config, overrides=overrides), quiet=True)
    unguided = [row["loss"] for row in read_rows(plain / "metrics.jsonl")]
    assert unguided[0] == one[0]["loss"]
    assert unguided[-1] != pytest.approx(one[-1]["loss"], rel=2e-3)

    with pytest.raises(ConfigError, match=r"network\.params\.z_dim: got 64, but the teacher .* has width 128"):
        train(load_config(config, overrides=[f"run_dir={tmp_path / 'wide'}", "train.steps=1", "network.params.z_dim=64"]), quiet=True)
