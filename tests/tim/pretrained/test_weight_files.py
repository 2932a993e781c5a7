"""Weights of other libraries where people keep them: pipelines, variants, pickles, single files and parts of repositories."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tim.models import autoencoder, bert
from tim import codecs
from tim.pretrained import weight_files
from tim.text import encoders

WEIGHTS = "diffusion_pytorch_model"
IMAGE = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(3, 16, 16)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoder(tmp_path_factory.mktemp("codec") / "vae", "kl")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("encoder") / "bert")


def latent(path: str | Path) -> torch.Tensor:
    return codecs.make("kl", path).encode([IMAGE]).means[0]


def with_weights(vae: Path, folder: Path, name: str) -> Path:
    """The same codec with its weights in a file of this name."""
    folder.mkdir(parents=True)
    shutil.copy(vae / "config.json", folder)
    weights = load_file(vae / f"{WEIGHTS}.safetensors")
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name", [f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.bin", "vae-ft-ema.safetensors", f"{WEIGHTS}.safetensors"]
)
def test_a_codec_under_every_name(name: str, vae: Path, tmp_path: Path) -> None:
    expected = latent(vae)
    folder = with_weights(vae, tmp_path / "pipe" / "vae", name)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for path in (folder, folder / name, tmp_path / "pipe", os.path.relpath(folder)):
        torch.testing.assert_close(latent(path), expected)
        assert codecs.digest(path)
    assert codecs.geometry("kl", tmp_path / "pipe") == codecs.geometry("kl", vae)


def test_the_plain_weights_go_before_a_variant_and_several_variants_are_asked_for(vae: Path, tmp_path: Path) -> None:
    folder = with_weights(vae, tmp_path / "vae", f"{WEIGHTS}.fp16.safetensors")
    half = {name: value * 0 for name, value in load_file(folder / f"{WEIGHTS}.fp16.safetensors").items()}
    save_file(half, folder / f"{WEIGHTS}.bf16.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has {WEIGHTS}\.bf16\.safetensors, .*: give the path of one of them"):
        latent(folder)
    torch.testing.assert_close(latent(folder / f"{WEIGHTS}.fp16.safetensors"), latent(vae))
    shutil.copy(vae / f"{WEIGHTS}.safetensors", folder)
    torch.testing.assert_close(latent(folder), latent(vae))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.bin", "encoder.safetensors"])
def test_a_text_encoder_under_every_name(name: str, encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "bert"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name, metadata={"format": "pt"})
    expected = encoders.make("hf", encoder, max_tokens=8).encode(["a red image"])[0]
    for path in (folder, folder / name):
        torch.testing.assert_close(encoders.make("hf", path, max_tokens=8).encode(["a red image"])[0], expected)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("exploded"),)


def test_what_cannot_be_loaded_is_one_line(vae: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = with_weights(vae, tmp_path / "bomb", f"{WEIGHTS}.bin")
    torch.save({"x": Bomb()}, bomb / f"{WEIGHTS}.bin")
    words = Path(shutil.copytree(encoder, tmp_path / "words"))
    (words / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, words / "pytorch_model.bin")
    cut = with_weights(vae, tmp_path / "cut", f"{WEIGHTS}.safetensors")
    (cut / f"{WEIGHTS}.safetensors").write_bytes((vae / f"{WEIGHTS}.safetensors").read_bytes()[:300])
    bare = with_weights(vae, tmp_path / "bare", f"{WEIGHTS}.bin")
    (bare / f"{WEIGHTS}.bin").unlink()
    (tmp_path / "note.pt").touch()
    refusals: list[tuple[Any, str]] = [
        (lambda: latent(bomb), "bomb: .*which could run code: save its weights alone"),
        (lambda: encoders.make("hf", words, max_tokens=8), "words: .*which could run code: save its weights alone"),
        (lambda: latent(cut), "cut: not weights that diffusers reads"),
        (lambda: latent(bare), rf"bare: has no weights: expected {WEIGHTS}\.safetensors"),
        (lambda: latent("note.pt"), r"note\.pt: weights are read from \.safetensors and \.bin files"),
        (lambda: latent("hf://alone"), r"hf://alone: expected hf://OWNER/NAME\[@REVISION\]\[/FOLDER\]"),
    ]
    for act, said in refusals:
        with pytest.raises(ValueError, match=said) as refusal:
            act()
        assert "\n" not in str(refusal.value)
        assert "\x1b" not in str(refusal.value)
    assert not (tmp_path / "exploded").exists()


def test_parts_of_a_repository(vae: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pipeline on the hub only the wanted part is fetched; its pickles only where there are no safetensors."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    with_weights(vae, remote / "vae", f"{WEIGHTS}.bin")
    (remote / "text_encoder").mkdir()
    (remote / "tokenizer").mkdir()
    for file in encoder.iterdir():
        shutil.copy(file, remote / ("text_encoder" if file.name in ("config.json", "model.safetensors") else "tokenizer"))
    (remote / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"], "text_encoder": [], "tokenizer": []}')
    (remote / "unet").mkdir()
    (remote / "unet" / f"{WEIGHTS}.safetensors").write_bytes(b"large")

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "me/pipe"
        for file in remote.rglob("*"):
            name = file.relative_to(remote).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for path in ("hf://me/pipe", "hf://me/pipe/vae", f"hf://me/pipe/vae/{WEIGHTS}.bin"):
        torch.testing.assert_close(latent(path), latent(vae))
    expected = encoders.make("hf", encoder, max_tokens=8).encode(["a red image"])[0]
    for path in ("hf://me/pipe", "hf://me/pipe/text_encoder"):
        torch.testing.assert_close(encoders.make("hf", path, max_tokens=8).encode(["a red image"])[0], expected)
    assert not (cache / "unet").exists()
    with pytest.raises(ValueError, match="me/pipe has no folder vqvae"):
        weight_files.locate("hf://me/pipe/vqvae")
