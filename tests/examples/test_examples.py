"""Every script in `examples/`, run as a person runs it: as a process, on a small prepared corpus."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import write_corpus
from launch.cli import main
from launch.config.load import load_config
from tests import REPOSITORY
from tests.launch.test_finetune import make_model
from tim import codecs
from tim.codecs.base import to_values

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
COUNT = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of the embedded corpus in two shards."""
    folder = tmp_path_factory.mktemp("examples")
    write_corpus(folder / "source", count=COUNT)
    prepare([str(folder / "source")], out=folder / "corpus", config=PrepareConfig.model_validate({"shards": {"max_samples": 8}}))
    return folder / "corpus"


def run(name: str, *arguments: object, folder: Path) -> str:
    """The output of an example that ends well. It runs in `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
    }
    command = [sys.executable, str(REPOSITORY / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short_and_say_what_they_show(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert text.startswith('"""')
    if path.name != "small_transformer.py":
        assert f"python examples/{path.name}" in text or f" examples/{path.name}" in text
        assert path.name in (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")


def test_pytorch_loop_trains_and_resumes(corpus: Path, tmp_path: Path) -> None:
    begun = run("pytorch_loop.py", corpus, "--steps", 2, "--checkpoint", "run.pt", folder=tmp_path)
    assert re.findall(r"^step (\d): loss \d", begun, re.MULTILINE) == ["0", "1"]
    resumed = run("pytorch_loop.py", corpus, "--steps", 3, "--checkpoint", "run.pt", folder=tmp_path)
    assert resumed.startswith("resumed from run.pt\nstep 2: loss ")
    assert resumed.endswith("saved run.pt\n")


def test_accelerate_loop_trains(corpus: Path, tmp_path: Path) -> None:
    said = run("accelerate_loop.py", corpus, "--steps", 2, "--workers", 0, "--cpu", folder=tmp_path)
    assert re.findall(r"^step (\d): loss \d.* images on 1 ranks$", said, re.MULTILINE) == ["0", "1"]
    assert (tmp_path / "accelerate_loop" / "custom_checkpoint_0.pkl").exists()


def test_webdataset_stream_packs_tars_and_pipes(corpus: Path, tmp_path: Path) -> None:
    said = run("webdataset_stream.py", f"pipe:cat {corpus}/000000.tar", corpus / "000001.tar", folder=tmp_path)
    assert re.search(rf"^{COUNT} images in \d+ tokens; left out: none$", said, re.MULTILINE)


def test_exported_plan_is_followed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        "plan: {max_tokens: 16, tokens_per_pack: 32, packs_per_step: 2, flip: 0.5}\n"
        "network: {params: {patch_size: 16, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}\n"
        "train: {steps: 2}\n"
    )
    options = ["--steps", "2", "--ranks", "2", "--export", str(tmp_path / "plan.jsonl")]
    assert main(["plan", str(tmp_path / "tiny.yaml"), f"corpus={corpus}", *options]) == 0
    said = run("exported_plan.py", "plan.jsonl", "--rank", 1, folder=tmp_path)
    assert re.search(r"^rank 1: \d+ images in 2 packs, kinds .*'diffusion'", said, re.MULTILINE)


def test_diffusers_network_trains_and_samples(corpus: Path, tmp_path: Path) -> None:
    said = run("diffusers_network.py", corpus, "--steps", 2, folder=tmp_path)
    assert re.findall(r"^step (\d): loss \d", said, re.MULTILINE) == ["0", "1"]
    assert said.endswith("sampled 64x64 in 1 evaluations\nsampled 96x32 in 4 evaluations\n")


def test_readers_see_the_same_samples(corpus: Path, tmp_path: Path) -> None:
    said = dict(line.split(": ", 1) for line in run("readers.py", corpus, folder=tmp_path).splitlines())
    assert list(said) == ["hugging_face", "plain_webdataset", "energon", "img2dataset"]
    assert len(set(said.values())) == 1
    assert said["energon"].startswith(f"{COUNT} samples, first ")


def test_upscaling_codec_makes_a_model_of_pixels_draw_large_images(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", load_config("demo"))
    assert run("upscaling_codec.py", "codec", "--factor", 8, "--steps", 2, folder=tmp_path).startswith("step 0: loss 0.")
    options = ["--codec", f"tiny={tmp_path / 'codec'}", "--size", "500x310", "--steps", "1", "--out", str(tmp_path / "large")]
    assert main(["sample", str(model), "a red circle on green", *options]) == 0
    (image,) = (path for path in (tmp_path / "large").glob("*.png") if path.name != "grid.png")
    assert Image.open(image).size == (500, 310)
    codec = codecs.make("tiny", tmp_path / "codec")
    pixels = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    (latent,) = codec.encode([pixels]).means
    assert torch.allclose(latent, avg_pool2d(to_values(pixels), 8), atol=1e-5)
