"""Codecs from tiny weights on disk: what diffusers makes of an image is what the network sees, whatever is encoded beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tim.models import AUTOENCODERS, autoencoder
from tim import codecs
from tim.codecs import autoencoder as autoencoders

KINDS = {"kl": (2, 6), "sd-vae": (8, 4), "dc-ae": (32, 32), "tiny": (4, 4)}


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_diffusers_scaled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    folder = autoencoder(tmp_path, kind)
    codec = codecs.make(kind, folder)
    assert codecs.geometry(kind, folder) == (codec.factor, codec.channels) == KINDS[kind]
    assert codec.is_stochastic == codecs.is_stochastic(kind) == (kind in ("kl", "sd-vae"))
    pictures = images((64, 96), (32, 64), (64, 96), (96, 32))
    monkeypatch.setattr(autoencoders, "BATCH_PIXELS", 1)
    alone = codec.encode(pictures)
    monkeypatch.undo()
    together = codec.encode(pictures)

    network: Any = getattr(diffusers, AUTOENCODERS[kind][0]).from_pretrained(folder).eval()
    scale, shift = network.config.scaling_factor, getattr(network.config, "shift_factor", None) or 0.0
    for i, picture in enumerate(pictures):
        with torch.no_grad():
            found = network.encode(picture[None] / 127.5 - 1)
        if codec.is_stochastic:
            assert together.deviations is not None
            torch.testing.assert_close(together.deviations[i], found.latent_dist.std[0] * scale, rtol=1e-4, atol=1e-5)
        expected = found.latent_dist.mean if codec.is_stochastic else found.latents if kind == "tiny" else found.latent
        torch.testing.assert_close(together.means[i], (expected[0] - shift) * scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.means[i], alone.means[i], rtol=1e-4, atol=1e-5)
        assert together.means[i].shape == (codec.channels, picture.shape[1] // codec.factor, picture.shape[2] // codec.factor)
    assert (together.deviations is not None) == codec.is_stochastic

    decoded = codec.decode(together.means)
    assert [image.shape for image in decoded] == [picture.shape for picture in pictures]
    with torch.no_grad():
        whole = network.decode(together.means[1][None] / scale + shift).sample[0]
    expected = ((whole + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (decoded[1].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["kl", "dc-ae"])
def test_large_images_go_through_in_tiles(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codecs.make(kind, autoencoder(tmp_path, kind))
    smooth = torch.linspace(0, 255, 3 * 256).view(3, 1, 256).expand(3, 256, 256).to(torch.uint8)
    whole = codec.encode([smooth]).means[0]
    monkeypatch.setattr(autoencoders, "TILE", 128)
    tiled, small = codec.encode([smooth]).means[0], codec.encode([smooth[:, :128, :128]]).means[0]
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    keep = 64 // codec.factor
    torch.testing.assert_close(tiled[:, :keep, :keep], small[:, :keep, :keep], rtol=1e-4, atol=1e-4)
    assert codec.decode([tiled])[0].shape == smooth.shape


def test_what_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = autoencoder(tmp_path / "kl", "kl")
    for kind, path, said in (
        ("vq", None, "unknown codec 'vq': choose one of pixel, sd-vae, kl, dc-ae, tiny"),
        ("dc-ae", None, r"codec dc-ae needs its weights: give its path, a folder that diffusers reads or hf://OWNER/NAME"),
        ("kl", tmp_path / "nowhere", r"nowhere: no such folder"),
        ("kl", tmp_path, r"has no config\.json"),
        ("tiny", folder, "has AutoencoderKL, codec tiny is AutoencoderTiny"),
        ("sd-vae", folder, "has 2 pixels per cell and 6 channels, codec sd-vae has 8 pixels per cell and 4 channels: use codec kl"),
        ("kl", "hf://nobody/nothing", r"hf://nobody/nothing cannot be downloaded .*give a local folder"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            codecs.make(kind, path)
        assert "\n" not in str(caught.value)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: expected diffusion_pytorch_model\.safetensors, a variant of it, or"):
        codecs.make("kl", folder)
