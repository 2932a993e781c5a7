"""The validation loss and the metrics of a step are the same for any number of ranks and under every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config.load import load_config
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.distributed import jobs

CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 3, lr: 1.0e-2, zero: 1, ema: 0.5}
validation: {share: 0.3, images: 9, every: 2}
checkpoint: {every: 2, keep_last: 9}
loader: {workers: 0}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def config(figures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has ended."""
    folder = tmp_path_factory.mktemp("validated")
    (folder / "run.yaml").write_text(f"corpus: {figures}\nrun_dir: {folder / 'run'}\n{CONFIG}")
    train(load_config(folder / "run.yaml"), quiet=True)
    return folder / "run.yaml"


def reports(config: Path, *, ranks: int) -> list[dict[str, Any]]:
    out = config.parent / f"{ranks}.json"
    jobs.run_ranks("tests.distributed.validation_worker", str(config), str(out), *"0123", log=config.parent / "log", ranks=ranks)
    return list(json.loads(out.read_text()).values())


def numbers_of_step(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in row.items() if name.startswith(("loss", "flops")) and name[-7:] != "_second" and value is not None
    }


def check(config: Path, *, ranks: int) -> None:
    _, expected, after = read_rows(config.parent / "run" / "metrics.jsonl")
    after["flops"] = after["flops_per_second"] * (after["seconds"] - expected["seconds"])
    of_step = numbers_of_step(after)
    assert len(of_step) > 6
    found = reports(config, ranks=ranks)
    assert len(found) == 4
    for report in found:
        assert report["restored"] == [True] * ranks
        assert report["again"]
        assert len(report["columns"]) > 9
        assert numbers_of_step(report["next_row"]) == pytest.approx(of_step, rel=1e-4)
        assert (report["next_row"]["ids_digest"], report["next_row"]["restarts"]) == (after["ids_digest"], 1)
        assert report["columns"] == pytest.approx({name: expected[name] for name in report["columns"]}, rel=1e-6)


def test_two_ranks_measure_what_one_does_under_every_stage(config: Path) -> None:
    check(config, ranks=2)


@pytest.mark.soak
def test_so_do_four_ranks_of_which_some_have_nothing_to_do(config: Path) -> None:
    check(config, ranks=4)
