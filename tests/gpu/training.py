"""A whole run on the device, from a corpus to images: interrupted, resumed, and sampled from."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import write_corpus
from launch.config.load import load_config
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.gpu.case import Case
from tests.gpu.runner import Result
from tim import Generator

NETWORK = "network.params={patch_size: 4, depth: 4, hidden_size: 256, num_heads: 4, cap_feat_dim: 64, encoder_depth: 1}"
TINY_NETWORK = "network.params={patch_size: 4, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16, encoder_depth: 1}"


def resume(case: Case) -> Result:
    """Two runs of the same steps, one of them interrupted after half of them: equal bit by bit up to the first step after it."""
    figures: dict[str, Any] = {}
    bounds: dict[str, float] = {}
    expected: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "source", count=case.size(200, 16))
        prepare([str(folder / "source")], out=folder / "corpus", config=PrepareConfig())
        for zero in case.size((1, 3), (1,)):
            unbroken, resumed = _two_runs(case, folder, zero=zero)
            label = f"ZeRO {zero}"
            middle, last = len(unbroken) // 2, unbroken[-1]
            figures |= {f"{label} loss": last["loss"], f"{label} resumed": resumed[-1]["loss"], f"{label} seconds": last["seconds"]}
            figures[f"{label} repeated derivatives"] = last["repeated_derivatives"]
            equal = [before["loss"] == after["loss"] for before, after in zip(unbroken, resumed, strict=True)]
            figures[f"{label} steps equal bit by bit"] = sum(equal)
            figures[f"{label} last losses"] = abs(resumed[-1]["loss"] / last["loss"] - 1)
            bounds[f"{label} last losses"] = 1e-3 if case.on_gpu else 0.0  # backward passes of cuDNN add up in any order
            expected[f"{label}: the first step after resuming has the same loss bit by bit"] = equal[middle]
            expected[f"{label}: the same samples"] = all(last[name] == resumed[-1][name] for name in ("images", "tokens", "ids_digest"))
            expected[f"{label}: no step was skipped"] = last["skipped_steps"] == 0
        generator = Generator.from_pretrained(folder / "unbroken-1" / "model", device=case.device)
        (image,) = generator("a red circle", height=32, width=64, steps=2)
        figures["sampled image"] = f"{image.width}x{image.height}"
        expected["an image of the size asked for"] = image.size == (64, 32)
    return Result(figures, bounds, expected)


def _two_runs(case: Case, folder: Path, *, zero: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the metrics of an unbroken run, and of one that goes on from a copy of its checkpoint in the middle."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        unbroken, resumed = folder / f"unbroken-{zero}", folder / f"resumed-{zero}"
        _train(case, folder, unbroken, zero=zero)
        shutil.copytree(unbroken, resumed)
        shutil.rmtree(resumed / "checkpoints" / f"step-{_steps(case):06d}")
        _train(case, folder, resumed, zero=zero)
        return read_rows(unbroken / "metrics.jsonl"), read_rows(resumed / "metrics.jsonl")
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _steps(case: Case) -> int:
    return case.size(6, 2)


def _train(case: Case, folder: Path, run_dir: Path, *, zero: int) -> None:
    settings = {
        "corpus": folder / "corpus",
        "run_dir": run_dir,
        "plan.max_tokens": 64,
        "plan.tokens_per_pack": case.size(1024, 128),
        "plan.packs_per_step": 2,
        "text.max_tokens": 16,
        "loader.workers": case.size(2, 0),
        "train.steps": _steps(case),
        "train.lr": 1e-3,
        "train.zero": zero,
        "train.precision": "bf16",
        "train.checkpointing": "full",
        "checkpoint.every": _steps(case) // 2,
        "log.every": 1,
    }
    overrides = [case.size(NETWORK, TINY_NETWORK), *(f"{key}={value}" for key, value in settings.items())]
    train(load_config(None, overrides=overrides), quiet=True)
