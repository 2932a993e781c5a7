"""Live views: exact where a codec is linear, closer than grey where it is not, fitted once per codec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tim.models import AUTOENCODERS, autoencoder
from tim import codecs
from tim.codecs import Latents, PixelCodec
from tim.disk_cache import DiskCache
from tim.sampling import live_view
from tim.sampling.live_view import LiveView, fit, live_view_for, synthetic_images


class LinearCodec:
    """Means of blocks of pixels, mixed by a matrix of more rows than colours."""

    factor, channels, is_stochastic = 4, 6, False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._mix = torch.randn(6, 3, generator=generator)
        self._shift = torch.randn(6, 1, 1, generator=generator)

    def encode(self, images: Sequence[Tensor]) -> Latents:
        means = [torch.nn.functional.avg_pool2d(image.float()[None] / 127.5 - 1, 4)[0] for image in images]
        return Latents([torch.einsum("ck,khw->chw", self._mix, mean) + self._shift for mean in means], None)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError


def photo(height: int, width: int, *, seed: int) -> Tensor:
    """A picture that no synthetic one is alike: waves of several lengths around a colour."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    speeds = 20 * torch.rand(3, 3, 2, generator=generator)
    waves = torch.stack([sum(torch.sin(a * rows + b * columns + 7 * a) for a, b in each.tolist()) for each in speeds])  # pyright: ignore
    return (255 * torch.rand(3, 1, 1, generator=generator) + 25 * waves).round().clamp(0, 255).to(torch.uint8)


def pooled(image: Tensor, factor: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(image.float()[None], factor)[0]


def test_a_linear_codec_is_seen_exactly() -> None:
    codec = LinearCodec()
    images = synthetic_images(codec)  # pyright: ignore[reportArgumentType]
    view = fit(codec.encode(images).means, images)
    for image in (photo(64, 32, seed=0), photo(4, 4, seed=1)):
        [latent] = codec.encode([image]).means
        seen = view.rgb(latent)
        assert seen.dtype == torch.uint8
        assert seen.shape == (3, image.shape[1] // 4, image.shape[2] // 4)
        assert (seen.float() - pooled(image, 4)).abs().max() <= 0.51  # rounding to levels


def test_the_pixel_codec_is_the_image_itself() -> None:
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1)
    view = live_view_for(PixelCodec(), {"kind": "pixel", "path": None}, cache=None)
    assert torch.equal(view.rgb(PixelCodec().encode([image]).means[0]), image)
    assert torch.equal(view.rgb(torch.full((3, 1, 1), 9.0)), torch.full((3, 1, 1), 255, dtype=torch.uint8))
    assert torch.equal(view.rgb(torch.full((3, 1, 1), float("nan"))), torch.full((3, 1, 1), 128, dtype=torch.uint8))


def errors(view: LiveView, codec: codecs.Codec, images: Sequence[Tensor]) -> tuple[float, float]:
    """Mean squared error of a view, and that of grey."""
    targets = [pooled(image, codec.factor) for image in images]
    seen = [view.rgb(latent).float() for latent in codec.encode(images).means]
    ours = [(each - target).square().mean() for each, target in zip(seen, targets, strict=True)]
    return float(sum(ours)), float(sum((target - 127.5).square().mean() for target in targets))


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_the_fit_beats_grey_on_random_codecs(kind: str, tmp_path: Path) -> None:
    codec = codecs.make(kind, autoencoder(tmp_path / kind, kind))
    view = live_view_for(codec, {"kind": kind, "path": str(tmp_path / kind)}, cache=None)
    assert view.matrix.shape == (3, codec.channels)
    ours, grey = errors(view, codec, synthetic_images(codec))
    assert ours < grey
    if kind in ("sd-vae", "flux-vae"):  # their random weights are blind to colours
        return
    side = 4 * codec.factor
    known, unknown = ([photo(side, 2 * side, seed=seed) for seed in seeds] for seeds in (range(24), range(100, 104)))
    ours, grey = errors(fit(codec.encode(known).means, known), codec, unknown)
    assert ours < grey
    if kind == "dc-ae":  # no normalisation over the whole image: what is fitted to synthetic images holds for others
        ours, grey = errors(view, codec, unknown)
        assert ours < 0.5 * grey


def test_a_view_is_fitted_once_per_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []
    original = live_view.fit
    monkeypatch.setattr(live_view, "fit", lambda latents, images: (fitted.append(len(images)), original(latents, images))[1])
    folder, cache = autoencoder(tmp_path / "kl", "kl"), DiskCache(tmp_path / "cache")
    section: dict[str, Any] = {"kind": "kl", "path": str(folder)}
    codec = codecs.make("kl", folder)
    first, again = (live_view_for(codec, section, cache=cache) for _ in range(2))
    assert len(fitted) == 1
    assert torch.equal(first.matrix, again.matrix)
    assert torch.equal(first.offset, again.offset)
    file = folder / "diffusion_pytorch_model.safetensors"
    alone = {"kind": "kl", "path": str(file)}
    live_view_for(codec, alone, cache=cache)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 2.0}))
    live_view_for(codecs.make("kl", file), alone, cache=cache)
    assert len(fitted) == 3  # a file of weights has other latents with another config
    weights = load_file(file)
    save_file({name: value * float("nan") for name, value in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the codec's latents are not finite: its weights are damaged"):
        live_view_for(codecs.make("kl", folder), section, cache=cache)


def test_views_are_stored_as_json() -> None:
    codec = LinearCodec()
    images = synthetic_images(codec)  # pyright: ignore[reportArgumentType]
    view = fit(codec.encode(images).means, images)
    again = LiveView.from_json(json.loads(json.dumps(view.to_json())))
    torch.testing.assert_close(again.matrix, view.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.offset, view.offset, rtol=1e-5, atol=1e-5)
    for content in ({}, {"matrix": [[1.0]], "offset": [0.0]}, {"matrix": None, "offset": [0, 0, 0]}):
        with pytest.raises(ValueError, match="not a live view"):
            LiveView.from_json(content)
    with pytest.raises(ValueError, match="at least one image"):
        fit([], [])


def test_synthetic_images_cover_colours() -> None:
    images = synthetic_images(LinearCodec())  # pyright: ignore[reportArgumentType]
    colours = torch.cat([image.reshape(3, -1) for image in images], 1)
    octants = {tuple(colour) for colour in (colours // 128).T.unique(dim=0).tolist()}
    assert len(octants) == 8
    assert all(torch.equal(one, other) for one, other in zip(images, synthetic_images(LinearCodec()), strict=True))  # pyright: ignore
