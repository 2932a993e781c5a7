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
from tim.codecs.base import Direction

KINDS = {"kl": (2, 6), "sd-vae": (8, 4), "flux-vae": (8, 16), "flux2-vae": (16, 128), "dc-ae": (32, 32), "tiny": (4, 4)}


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_diffusers_scaled(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    folder = autoencoder(tmp_path, kind)
    codec = codecs.make(kind, folder)
    assert codecs.geometry(kind, folder) == (codec.factor, codec.channels) == KINDS[kind]
    assert codec.is_stochastic == codecs.is_stochastic(kind) == (kind in ("kl", "sd-vae", "flux-vae"))
    pictures = images((64, 96), (32, 64), (64, 96), (96, 32))
    monkeypatch.setattr(autoencoders, "BATCH_PIXELS", 1)
    alone = codec.encode(pictures)
    monkeypatch.undo()
    together = codec.encode(pictures)

    network: Any = getattr(diffusers, AUTOENCODERS[kind][0]).from_pretrained(folder).eval()
    for i, picture in enumerate(pictures):
        with torch.no_grad():
            found = network.encode(picture[None] / 127.5 - 1)
        expected, deviation = normalised(kind, network, found)
        if codec.is_stochastic:
            assert together.deviations is not None
            torch.testing.assert_close(together.deviations[i], deviation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.means[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.means[i], alone.means[i], rtol=1e-4, atol=1e-5)
        assert together.means[i].shape == (codec.channels, picture.shape[1] // codec.factor, picture.shape[2] // codec.factor)
    assert (together.deviations is not None) == codec.is_stochastic

    decoded = codec.decode(together.means)
    assert [image.shape for image in decoded] == [picture.shape for picture in pictures]
    with torch.no_grad():
        whole = network.decode(denormalised(kind, network, together.means[1][None])).sample[0]
    expected = ((whole + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (decoded[1].int() - expected.int()).abs().max() <= 1
    assert codec.tiling(64, 96).splits == codec.tiling(64, 96, "encode").splits == 1


def normalised(kind: str, network: Any, found: Any) -> tuple[Tensor, Tensor | None]:
    """Latent and deviation of the first image in an output of diffusers, as its pipelines normalise them."""
    if kind == "flux2-vae":
        latent = found.latent_dist.mode()
        _, channels, height, width = latent.shape
        latent = latent.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, channels * 4, height // 2, -1)
        mean, deviation = (each.view(1, -1, 1, 1) for each in statistics(network))
        return ((latent - mean) / deviation)[0], None
    scale, shift = network.config.scaling_factor, getattr(network.config, "shift_factor", None) or 0.0
    if hasattr(found, "latent_dist"):
        return (found.latent_dist.mean[0] - shift) * scale, found.latent_dist.std[0] * scale
    return ((found.latents if kind == "tiny" else found.latent)[0] - shift) * scale, None


def denormalised(kind: str, network: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalised`."""
    if kind == "flux2-vae":
        mean, deviation = (each.view(1, -1, 1, 1) for each in statistics(network))
        _, channels, height, width = latents.shape
        latents = (latents * deviation + mean).reshape(1, channels // 4, 2, 2, height, width)
        return latents.permute(0, 1, 4, 2, 5, 3).reshape(1, channels // 4, height * 2, width * 2)
    return latents / network.config.scaling_factor + (getattr(network.config, "shift_factor", None) or 0.0)


def statistics(network: Any) -> tuple[Tensor, Tensor]:
    return network.bn.running_mean, torch.sqrt(network.bn.running_var + network.config.batch_norm_eps)


def test_pixels_of_any_channels() -> None:
    rgb = torch.tensor([[[255, 10]], [[255, 20]], [[255, 30]]], dtype=torch.uint8)
    for channels, expected in ((1, [[[255, 18]]]), (3, rgb.tolist()), (4, [*rgb.tolist(), [[255, 255]]])):
        codec = codecs.make("pixel", channels=channels)
        assert (codec.factor, codec.channels) == codecs.geometry("pixel", channels=channels) == (1, channels)
        [decoded] = codec.decode(codec.encode([rgb]).means)
        assert decoded.tolist() == expected
        assert torch.equal(codec.decode(codec.encode([decoded]).means)[0], decoded)
    two = rgb[:2]
    assert torch.equal(codecs.PixelCodec(2).decode(codecs.PixelCodec(2).encode([two]).means)[0], two)
    with pytest.raises(ValueError, match=r"codec pixel has 4 channels, the image has 2: give codec.channels=2"):
        codecs.make("pixel", channels=4).encode([two])


def test_what_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = autoencoder(tmp_path / "kl", "kl")
    for kind, path, said in (
        ("vq", None, "unknown codec 'vq': choose one of pixel, sd-vae, sd3-vae, flux-vae, flux2-vae, kl, dc-ae, tiny"),
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


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_codec_without_weights_plans_as_the_real_one(kind: str, tmp_path: Path) -> None:
    folder = autoencoder(tmp_path, kind)
    real = codecs.make(kind, folder, memory_gb=0.2)
    planned = codecs.without_weights(kind, folder, memory_gb=0.2)
    assert (planned.factor, planned.channels) == (real.factor, real.channels)
    directions: tuple[Direction, ...] = ("encode", "decode")
    for direction in directions:
        assert planned.tiling(512, 768, direction) == real.tiling(512, 768, direction)
