"""Loss masks and loss weights of corpora in training steps and in validations. One process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from launch.config.load import load_config
from launch.training.metrics import read_rows
from launch.training.train import train
from tests.pipeline.conftest import image
from tests.pipeline.images.test_masks import png

CONFIG = """\
plan: {max_tokens: 12, tokens_per_pack: 24, packs_per_step: 3}
network: {params: {patch_size: 8, depth: 1, hidden_size: 16, num_heads: 1, cap_feat_dim: 16}}
train: {steps: 1, lr: 1.0e-3, ema: 0.5}
validation: {share: 0.4, every: 1}
loader: {workers: 0}
log: {every: 1}
"""
GREY = 51  # a fifth of 255

Row = Callable[..., dict[str, Any]]


def masked(kind: str) -> np.ndarray | None:
    """A mask of 24 x 32 pixels."""
    mask = np.full((24, 32), GREY, np.uint8)
    if kind == "half":
        mask[:, :16], mask[:, 16:] = 255, 0
    return None if kind == "plain" else mask


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """The metrics of the first step on the same images, with different masks."""
    folder = tmp_path_factory.mktemp("masks")
    (folder / "run.yaml").write_text(CONFIG)
    for kind in ("plain", "grey", "half"):
        pictures, mask = folder / kind / "pictures", masked(kind)
        pictures.mkdir(parents=True)
        for number in range(12):
            Image.fromarray(image(24, 32, seed=number)).save(pictures / f"{number:02}.png")
            (pictures / f"{number:02}.txt").write_text(f"picture {number}")
            if mask is not None:
                (pictures / f"{number:02}.mask.png").write_bytes(png(mask))
        prepare([str(pictures)], out=folder / kind / "corpus", config=PrepareConfig())

    def measured(kind: str, *, loss_weight: float = 1.0) -> dict[str, Any]:
        run = folder / f"run-{kind}-{loss_weight}"
        corpus = f"corpus={{path: {folder / kind / 'corpus'}, loss_weight: {loss_weight}}}"
        train(load_config(folder / "run.yaml", overrides=[corpus, f"run_dir={run}"]), quiet=True)
        (row,) = read_rows(run / "metrics.jsonl")
        return row

    return measured


def losses(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(("loss", "validation")) and value is not None}


def test_masks_and_weights_scale_the_gradient_and_not_the_losses(row: Row) -> None:
    plain, grey, weighted = row("plain"), row("grey"), row("grey", loss_weight=0.5)
    assert plain["validation_images"] > 1
    assert [each["ids_digest"] for each in (grey, weighted)] == [plain["ids_digest"]] * 2
    assert grey["grad_norm"] == pytest.approx(plain["grad_norm"] * GREY / 255, rel=1e-4)
    assert weighted["grad_norm"] == pytest.approx(grey["grad_norm"] / 2, rel=1e-4)
    at_step = {name: value for name, value in losses(plain).items() if not name.startswith("validation")}
    for other in (grey, weighted):
        assert {name: other[name] for name in at_step} == pytest.approx(at_step, rel=1e-5)


def test_losses_are_those_of_the_part_that_is_trained(row: Row) -> None:
    plain, half = row("plain", loss_weight=2), row("half")
    assert half["images"] == plain["images"]
    for name in ("loss", "loss_diffusion", "validation_loss", "validation_loss_diffusion", "validation_loss_ema"):
        assert half[name] != pytest.approx(plain[name], rel=1e-3), name
