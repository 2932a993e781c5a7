"""What a run keeps over resumes and rollbacks. One process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

from launch.config.load import load_config
from launch.guards.loss_spikes import SpikeDetector
from launch.training import trainer
from launch.training.guidance_network import GuidanceNetwork
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.pipeline.conftest import varied, write_corpus

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 1, hidden_size: 16, num_heads: 1, cap_feat_dim: 16}}
objective: {guidance: {interval: [0, 1]}}
train: {lr: 1.0e-3, ema: 0.9, spike: rollback}
loader: {workers: 0}
checkpoint: {every: 2, keep_last: 9}
log: {every: 1}
"""

GoOn = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def go_on(tmp_path: Path) -> GoOn:
    """Trains a run to a number of steps, and returns its rows."""
    write_corpus(tmp_path / "corpus", shards=[varied(12, seed=0)])
    (tmp_path / "run.yaml").write_text(f"corpus: {tmp_path / 'corpus'}\nrun_dir: {tmp_path / 'run'}\n{CONFIG}")

    def run(*, steps: int) -> list[dict[str, Any]]:
        train(load_config(tmp_path / "run.yaml", overrides=[f"train.steps={steps}"]), quiet=True)
        return read_rows(tmp_path / "run" / "metrics.jsonl")

    return run


def test_restarts_are_counted_without_the_metrics(go_on: GoOn, tmp_path: Path) -> None:
    assert [row["restarts"] for row in go_on(steps=2)] == [0, 0]
    assert [row["restarts"] for row in go_on(steps=4)] == [0, 0, 1, 1]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert [row["restarts"] for row in go_on(steps=6)] == [2, 2]


def test_a_rollback_holds_one_guidance_network(go_on: GoOn, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[int] = []
    alive: WeakSet[GuidanceNetwork] = WeakSet()

    class Counted(GuidanceNetwork):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            before.append(len(alive))
            super().__init__(*arguments, **options)
            alive.add(self)

    spikes = iter([None, None, None, "made up"])
    monkeypatch.setattr(trainer, "GuidanceNetwork", Counted)
    monkeypatch.setattr(SpikeDetector, "add", lambda *_: next(spikes, None))
    assert go_on(steps=5)[-1]["rollbacks"] == 1
    assert before == [0, 0], "one at the first step, one for the weights of the checkpoint"
