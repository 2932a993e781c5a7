"""Class training end to end: labelled images → shards with KEY.cls → two ZeRO-3 ranks → a model that draws classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from launch.cli import main
from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.training.metrics import read_rows
from launch.training.planning import make_planner
from tests.distributed import jobs
from tim import TransitionTransformer
from tim.model_folder.folder import load_model

IMAGES = 48
CONFIG = """\
condition: class
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, num_classes: 5, class_dropout_prob: 0.2, new_condition: "t,r,t-r"}
objective: {shift: null}
train: {steps: 8, lr: 1e-2, zero: 3}
loader: {workers: 0}
log: {every: 1}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of classes 0 to 2, without captions. Shards made of shards: KEY.cls is written and read back."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    (folder / "source").mkdir()
    rows = []
    for number in range(IMAGES):
        height, width = (int(side) for side in rng.integers(16, 49, 2))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "source" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "label": number % 3})
    (folder / "source" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    prepare([str(folder / "source")], out=folder / "first", config=PrepareConfig())
    counts = prepare([str(folder / "first" / "000000.tar")], out=folder / "corpus", config=PrepareConfig())
    assert counts.kept == IMAGES
    return folder / "corpus"


def test_two_ranks_train_the_classes_of_the_corpus_and_none(corpus: Path, tmp_path: Path) -> None:
    config, run, log = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "log"
    config.write_text(f"corpus: {corpus}\n{CONFIG}")
    with pytest.raises(ConfigError, match=r"has class 2, but network\.params\.num_classes 2 allows 0 to 1"):
        make_planner(load_config(config, overrides=["network.params.num_classes=2"]))
    jobs.run_ranks("launch.cli", "train", str(config), f"run_dir={run}", log=log)
    assert all(row["failed"] == row["skipped_steps"] == 0 for row in read_rows(run / "metrics.jsonl"))

    network, spec = load_model(run / "model")
    torch.manual_seed(0)
    untrained = TransitionTransformer.from_official(spec.network)
    table, before = (net.state_dict()["y_embedder.embedding_table.weight"] for net in (network, untrained))
    moved = [not torch.equal(row, old) for row, old in zip(table, before, strict=True)]
    assert moved == [True, True, True, False, False, True]  # three classes, two that no image has, and none

    asked = ["--class", "0", "--class", "4", "--size", "24x24,48x16", "--steps", "1,4", "--guidance", "2"]
    assert main(["sample", str(run), *asked, "--out", str(tmp_path / "s")]) == 0
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "s").glob("0*.png")}  # without the digest
    sizes = ("24x24", "48x16")
    assert names == {
        f"000{i}-class-{number}-{size}-steps{n}-cfg2-seed0" for i, number in enumerate((0, 4)) for size in sizes for n in (1, 4)
    }
    assert (tmp_path / "s" / "grid.png").is_file()
