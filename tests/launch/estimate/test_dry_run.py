"""`tim train --dry-run`: what it finds wrong, and that it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.cli import main
from launch.config.load import load_config
from launch.config.recipes import recipe_names
from launch.estimate.dry_run import dry_run
from tests.pipeline.conftest import Sample, write_corpus
from tim import TransitionTransformer

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = [[Sample(20 + 7 * i, 60 - 4 * i, (f"number {i}",)) for i in range(4)] for _ in range(2)]
    write_corpus(tmp_path / "corpus", shards=samples)
    (tmp_path / "run.yaml").write_text(CONFIG + f"corpus: {tmp_path / 'corpus'}\nrun_dir: {tmp_path / 'run'}\n")
    return tmp_path


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def check(folder: Path, *overrides: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and checks by name."""
    try:
        code = main(["train", str(folder / "run.yaml"), "--dry-run", "--json", *overrides])
    except SystemExit as ended:
        code = ended.code
    assert isinstance(code, int)
    return code, {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_pass(recipe: str) -> None:
    found = dry_run(load_config(recipe), ranks=8)
    assert found.ok, list(found.lines())
    assert {check.name for check in found.checks if check.status == "not given"} >= {"corpus", "run_dir"}
    assert found.memory is not None


def test_a_run_that_can_start_leaves_no_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    code, checks = check(folder, capsys=capsys)
    assert code == 0, checks
    assert {each["status"] for each in checks.values()} == {"ok"}
    assert checks["shards"]["detail"].startswith("read ")
    assert files(folder) == before


def test_problems_have_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "corpus" / "000001.tar"
    shard.rename(folder / "elsewhere.tar")
    code, checks = check(folder, capsys=capsys)
    assert (code, checks["plan"]["status"]) == (2, "problem")
    assert "000001.tar" in checks["plan"]["detail"]
    (folder / "elsewhere.tar").rename(shard)
    shard.write_bytes(b"\0" * shard.stat().st_size)
    code, checks = check(folder, capsys=capsys)
    assert (code, checks["plan"]["status"], checks["shards"]["status"]) == (2, "ok", "problem")
    assert "verify" in checks["shards"]["detail"]


def test_weights_are_compared_by_their_headers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "weights.safetensors"
    network = TransitionTransformer.from_official(load_config(folder / "run.yaml").network.params.model_dump(exclude_none=True))
    save_file(network.state_dict(), weights)
    code, checks = check(folder, f"train.init={weights}", capsys=capsys)
    assert (code, checks["train.init"]["status"]) == (0, "ok")
    code, checks = check(folder, f"train.init={weights}", "network.params.hidden_size=48", capsys=capsys)
    assert (code, checks["train.init"]["status"]) == (2, "problem")
    assert "wrong shapes" in checks["train.init"]["detail"]
    torch.save({"ema": network.state_dict()}, folder / "weights.pt")
    code, checks = check(folder, f"train.init={folder / 'weights.pt'}", capsys=capsys)
    assert checks["train.init"]["status"] == "ok"
    code, checks = check(folder, f"train.init={folder / 'nothing.pt'}", capsys=capsys)
    assert (code, checks["train.init"]["status"]) == (2, "problem")
