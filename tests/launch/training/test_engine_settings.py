"""Runs with the engine's settings, from a configuration to a model. One process, a network of a few thousand parameters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.averages import saved_decays
from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.pipeline.conftest import varied, write_corpus

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 1, hidden_size: 16, num_heads: 1, cap_feat_dim: 16}}
train:
  steps: 6
  lr: 1.0e-2
  ema: [0.5, 0.9]
  schedule: wsd
  decay: 4
  lr_factors: {"blocks.0.*": 0.5}
loader: {workers: 0}
checkpoint: {every: 3, keep_last: 9}
log: {every: 1}
"""
OFFLOAD = "train.deepspeed={zero_force_ds_cpu_optimizer: false, zero_optimization: {offload_optimizer: {device: cpu, pin_memory: false}}}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    write_corpus(folder, shards=[varied(12, seed=0)])
    return folder


def run(corpus: Path, run_dir: Path, *overrides: str, quiet: bool = True) -> list[dict[str, Any]]:
    """Train; the rows of the run's metrics."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(CONFIG)
    train(load_config(path, overrides=[f"corpus={corpus}", f"run_dir={run_dir}", *overrides]), quiet=quiet)
    return read_rows(run_dir / "metrics.jsonl")


def story(rows: list[dict[str, Any]]) -> list[float]:
    return [row[column] for row in rows for column in ("loss", "grad_norm", "lr")]


def test_stages_and_offloading_train_alike_and_go_on_in_each_other(corpus: Path, tmp_path: Path) -> None:
    expected = story(run(corpus, tmp_path / "one"))
    assert expected[2::3] == pytest.approx([0.01, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    assert story(run(corpus, tmp_path / "zero", "train.zero=0")) == pytest.approx(expected, rel=1e-4)
    assert story(run(corpus, tmp_path / "offload", "train.zero=2", OFFLOAD)) == pytest.approx(expected, rel=1e-4)

    for name in ("one", "offload"):  # ZeRO 1 → 0, and CPU → memory of the device
        (tmp_path / name / "latest").unlink()
        last = checkpoint.find(tmp_path / name, step=6).folder
        last.rename(tmp_path / f"{name}-6")
        again = run(corpus, tmp_path / name, "train.zero=0")
        assert [row["step"] for row in again] == [1, 2, 3, 4, 5, 6]
        assert story(again) == pytest.approx(expected, rel=1e-4)
        for ema in (False, 0.5, 0.9):
            found = checkpoint.consolidate(checkpoint.find(tmp_path / name).folder, ema=ema)
            unbroken = checkpoint.consolidate(tmp_path / f"{name}-6", ema=ema)
            for key in unbroken:
                torch.testing.assert_close(found[key], unbroken[key], rtol=1e-3, atol=1e-6)


def test_eight_bit_moments_go_on_bit_by_bit_and_to_rounding_under_another_stage(corpus: Path, tmp_path: Path) -> None:
    eight = "train.optimizer=adamw8bit"
    expected = story(run(corpus, tmp_path / "run", eight))
    assert expected == pytest.approx(story(run(corpus, tmp_path / "full", "train.optimizer=adamw")), rel=0.05)
    for stage in (1, 0):
        (tmp_path / "run" / "latest").unlink()
        checkpoint.remove(checkpoint.step_folder(tmp_path / "run", 6))
        again = story(run(corpus, tmp_path / "run", eight, f"train.zero={stage}"))
        assert again == expected if stage else again == pytest.approx(expected, rel=0.01)


def test_a_missing_bitsandbytes_is_named_with_its_remedy(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError) as caught:
        run(corpus, tmp_path / "run", "train.optimizer=adamw8bit")
    assert str(caught.value) == "train.optimizer: adamw8bit needs bitsandbytes: pip install 'tim[adamw8bit]'"


@pytest.mark.parametrize("stage", [0, 1])
def test_adamw_is_fused(corpus: Path, tmp_path: Path, stage: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(corpus, tmp_path / "run", "train.steps=1", "train.schedule=constant", "train.decay=null", f"train.zero={stage}")
    called = {event.key for event in profile.key_averages()}
    assert "aten::_fused_adamw_" in called
    assert not {"aten::addcdiv_", "aten::_foreach_addcdiv_"} & called


def test_a_run_goes_on_with_other_averages(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(corpus, tmp_path / "run")
    before = checkpoint.find(tmp_path / "run", step=6).folder
    capsys.readouterr()
    changed = ("train.steps=7", "train.ema=[0.9, 0.99]", "train.lr_factors={'*': 0}")  # nothing moves but the averages
    run(corpus, tmp_path / "run", *changed, quiet=False)
    assert "the average with decay 0.99 is new, it starts from the weights of this checkpoint" in capsys.readouterr().err
    after = checkpoint.find(tmp_path / "run", step=7).folder
    assert saved_decays(after) == [0.9, 0.99]
    weights, average = checkpoint.consolidate(before, ema=False), checkpoint.consolidate(before, ema=0.9)
    decay = 7 / 16  # after six updates: min(0.9, (1 + 6) / (10 + 6))
    for name, value in checkpoint.consolidate(after, ema=True).items():
        torch.testing.assert_close(value, decay * average[name] + (1 - decay) * weights[name])
    for name, value in checkpoint.consolidate(after, ema=0.99).items():
        torch.testing.assert_close(value, weights[name])
