"""8-bit AdamW on two real ranks: it trains like AdamW, and a run goes on bit by bit in its layout, to rounding in another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import Checkpoint, CheckpointMetadata
from launch.distributed.ranks import Ranks
from tests.distributed import eight_bit_worker as worker
from tests.distributed import jobs
from tests.launch.checkpoints.writing import save

CASES = ("0", "1", "3", "1-offload")
ELSEWHERE = {"0": "2", "1": "0", "3": "1", "1-offload": "2"}  # where one process goes on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left reports and checkpoints of all cases."""
    folder = tmp_path_factory.mktemp("eight_bit")
    jobs.run_ranks("tests.distributed.eight_bit_worker", str(folder), *CASES, log=folder / "log")
    return folder


def report(folder: Path, case: str) -> dict[str, Any]:
    return json.loads((folder / case / "report.json").read_text())


def files(run: Path) -> dict[str, str]:
    """Digests of the files of a checkpoint."""
    folder = checkpoint.find(run).folder
    checkpoint.check(folder)
    return {name: entry["sha256"] for name, entry in json.loads((folder / checkpoint.MANIFEST).read_text())["files"].items()}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_as_with_full_moments(folder: Path, case: str) -> None:
    exact = json.loads((folder / "exact.json").read_text())
    losses, expected = ([row[0] for row in rows] for rows in (report(folder, case)["first"], exact))
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_same_layout_goes_on_bit_by_bit(folder: Path, case: str) -> None:
    found = report(folder, case)
    assert found["resumed"] == found["unbroken"]
    assert files(folder / case / "loaded") == files(folder / case / "saved")
    assert files(folder / case / "resumed") == files(folder / case / "unbroken")


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_codes_and_scales(folder: Path, case: str) -> None:
    saved = checkpoint.find(folder / case / "saved")
    codes, scales, whole = (saved.pieces(kind) for kind in ("exp_avg_codes", "exp_avg_scales", "exp_avg"))
    assert {name for name in codes.shapes if name in codes} == {name for name, shape in codes.shapes.items() if len(shape) == 2}
    assert {name for name in codes.shapes if name in whole} == {name for name, shape in codes.shapes.items() if len(shape) == 1}
    assert codes.tensor("blocks.0.weight").dtype == torch.uint8
    blocks = sum(values.get_shape()[0] for _, values in scales.pieces("blocks.0.weight"))
    assert 33 * 33 // 256 < blocks <= 33 * 33 // 256 + 3


def dequantised(saved: Checkpoint, moment: str) -> dict[str, Tensor]:
    """The moment of every matrix, put together element by element."""
    code = create_dynamic_map(signed=moment == "exp_avg")
    codes, scales = saved.pieces(f"{moment}_codes"), saved.pieces(f"{moment}_scales")
    result = {}
    for name, shape in codes.shapes.items():
        if name in codes:
            values = torch.full((torch.Size(shape).numel(),), torch.nan)
            for (start, of_elements), (block, of_blocks) in zip(codes.pieces(name), scales.pieces(name), strict=True):
                for at, element in enumerate(of_elements[:].tolist(), start=start):
                    values[at] = code[element] * of_blocks[:][(at - block) // 256]
            result[name] = values
    return result


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_in_another_layout_to_rounding(folder: Path, alone: Ranks, tmp_path: Path, case: str) -> None:
    saved = checkpoint.find(folder / case / "saved")
    engine = worker.resume(alone, saved.folder, ELSEWHERE[case])
    save(tmp_path, CheckpointMetadata(step=worker.STEPS, world_size=1, config_hash=""), worker.part_of(engine), ranks=alone)
    rows = worker.take_steps(engine, alone, range(worker.STEPS, worker.STEPS + worker.MORE))
    engine.close()
    for moment in ("exp_avg", "exp_avg_sq"):
        found, expected = (dequantised(of, moment) for of in (checkpoint.find(tmp_path), saved))
        assert list(found) == list(expected)
        for name, values in found.items():
            assert float((values - expected[name]).norm()) < 0.05 * float(expected[name].norm()), (moment, name)
    unbroken = report(folder, case)["unbroken"]
    assert [row[0] for row in rows] == pytest.approx([row[0] for row in unbroken], rel=5e-3)


CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 1000, lr: 1.0e-3, optimizer: adamw8bit}
loader: {workers: 0}
checkpoint: {every: 2, keep_last: 99}
log: {every: 1}
"""


@pytest.mark.soak
@pytest.mark.parametrize("zero", [1, 3])
def test_a_killed_run_goes_on_bit_by_bit(figures: Path, tmp_path: Path, zero: int) -> None:
    config, log, broken, unbroken = (tmp_path / name for name in ("run.yaml", "log", "broken", "unbroken"))
    config.write_text(f"corpus: {figures}\n{CONFIG}")
    arguments = ("launch.cli", "train", str(config), f"train.zero={zero}")
    ranks = jobs.start_ranks(*arguments, f"run_dir={broken}", log=log)
    jobs.wait_for_row(broken, 5, ranks, log=log)
    ranks.kill()
    killed = checkpoint.find(broken).metadata.step
    for run_dir in (broken, unbroken):
        jobs.run_ranks(*arguments, f"run_dir={run_dir}", f"train.steps={killed + 4}", log=log)
    columns = ["step", "loss", "grad_norm", "ids_digest"]
    assert jobs.story(broken, columns=columns) == jobs.story(unbroken, columns=columns)
    found, expected = files(broken), files(unbroken)
    assert {name: found[name] for name in found if name != checkpoint.TRAINER_STATE} == {
        name: expected[name] for name in expected if name != checkpoint.TRAINER_STATE
    }
