"""The whole way with the codecs and text encoders of published models, tiny: encode a corpus, train on it, sample at any size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from tests.tim.models import autoencoder, gemma, t5

CONFIG = """\
network: {params: {patch_size: 1, depth: 1, hidden_size: 32, num_heads: 2}}
plan: {max_tokens: 64, tokens_per_pack: 256, packs_per_step: 1}
train: {steps: 1}
loader: {workers: 0}
"""
# codec, its factor, text encoder
FAMILIES = [("dc-ae", 32, "gemma"), ("flux2-vae", 16, "t5"), ("flux-vae", 8, "gemma"), ("sd-vae", 8, "t5"), ("kl", 2, "t5")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(64, 96), (70, 64)]):
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"image number {number}")
    assert main(["prepare", str(folder / "images"), "--out", str(folder / "corpus"), "--workers", "1", "filters.min_side=1"]) == 0
    return folder / "corpus"


@pytest.mark.parametrize(("codec", "factor", "text"), FAMILIES, ids=[f"{codec} and {text}" for codec, _, text in FAMILIES])
def test_from_encoding_to_sampling(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], codec: str, factor: int, text: str
) -> None:
    vae = autoencoder(tmp_path / "vae", codec)
    words = {"gemma": gemma, "t5": t5}[text](tmp_path / "words")
    (tmp_path / "run.yaml").write_text(CONFIG)
    models = [f"codec={{kind: {codec}, path: {vae}}}", f"text={{kind: hf, path: {words}, max_tokens: 16}}"]
    width = json.loads((words / "config.json").read_text())["hidden_size" if text == "gemma" else "d_model"]
    config = [str(tmp_path / "run.yaml"), f"corpus={{path: {corpus}, features: {tmp_path / 'features'}}}", *models]
    config.append(f"network.params.cap_feat_dim={width}")
    resolved = tmp_path / "whole.yaml"
    resolved.write_text("\n".join([CONFIG.replace("hidden_size: 32", f"hidden_size: 32, cap_feat_dim: {width}"), *_yaml(models)]))
    assert main(["encode", str(corpus), "--for", str(resolved), "--out", str(tmp_path / "features"), "--processes", "1"]) == 0
    assert main(["train", *config, f"run_dir={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    sizes = [(factor * 2 + 1, factor + 3), (factor, factor * 3)]
    size = ",".join(f"{w}x{h}" for w, h in sizes)
    options = ["--size", size, "--steps", "1", "--guidance", "2", "--out", str(tmp_path / "images"), "--json"]
    assert main(["sample", str(tmp_path / "run"), "the red image", *options]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [Image.open(image["path"]).size for image in images] == sizes


def _yaml(overrides: list[str]) -> list[str]:
    return [override.replace("=", ": ", 1) for override in overrides]
