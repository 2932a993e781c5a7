"""Adapters of another run: its weights are found again after it has gone on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.checkpoints import checkpoint
from launch.checkpoints.initial_weights import load_weights
from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.estimate.initial_header import check_initial
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.pipeline.conftest import varied, write_corpus

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 1}
network: {params: {patch_size: 8, depth: 1, hidden_size: 16, num_heads: 1, cap_feat_dim: 16}}
objective: {diffusion_share: 1, consistency_share: 0}
train: {steps: 2, lr: 1.0e-2}
loader: {workers: 0}
checkpoint: {every: 1}
log: {every: 1, trackers: []}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", shards=[varied(12, seed=0)])
    path = tmp_path / "run.yaml"
    path.write_text(f"corpus: {tmp_path / 'corpus'}\n{CONFIG}")
    return path


def run(config: Path, name: str, *overrides: str, quiet: bool = True) -> Path:
    folder = config.parent / name
    train(load_config(config, overrides=[f"run_dir={folder}", *overrides]), quiet=quiet)
    return folder


def source_of(run: Path) -> Path:
    return Path(checkpoint.read_trainer_state(checkpoint.find(run).folder)["frozen"]["source"])


def test_a_finished_run_gives_its_model(config: Path) -> None:
    first = run(config, "first")
    lora = run(config, "lora", "train.lora={rank: 2}", f"train.init={first}")
    assert source_of(lora) == first / "model"
    shutil.rmtree(first / "checkpoints")
    run(config, "lora", "train.lora={rank: 2}", f"train.init={first}", "train.steps=3")
    shutil.rmtree(lora / "model")
    assert checkpoint.find(lora).metadata.step == 3
    following = load_config(config, overrides=[f"run_dir={config.parent / 'next'}", f"train.init={lora}"])
    assert "all as in the network" in check_initial(following)  # its checkpoints hold adapters only


def test_a_run_that_goes_on_keeps_its_former_weights_for_others(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(config, "first")
    shutil.rmtree(first / "model")  # as if it were still training
    assert load_weights(first).source == first / "checkpoints" / "step-000002"
    settings = ("train.lora={rank: 2}", f"train.init={first}")
    lora = run(config, "lora", *settings, quiet=False)
    assert f"reads the frozen weights in {first}/checkpoints/step-000002 again, which its run may remove: give" in capsys.readouterr().err
    run(config, "first", "train.steps=3")
    run(config, "lora", *settings, "train.steps=3")
    assert [row["step"] for row in read_rows(lora / "metrics.jsonl")] == [1, 2, 3]
    assert source_of(lora) == first / "checkpoints" / "step-000002"
    run(config, "first", "train.steps=4")
    with pytest.raises(ConfigError, match=r"began with, .*first/checkpoints/step-000002, are not there any more: restore them"):
        run(config, "lora", *settings, "train.steps=4")
