"""Codecs: images to latents and back. The network only ever sees latents.

| kind | what it is | pixels per cell, channels |
| --- | --- | --- |
| pixel | the image itself; no weights | 1, 3 |
| sd-vae | Stable Diffusion's autoencoder (diffusers' AutoencoderKL), which draws its latents | 8, 4 |
| kl | any AutoencoderKL | as its config says |
| dc-ae | the deep compression autoencoder (AutoencoderDC, arXiv 2410.10733) | 32, 32 |
| tiny | a small, fast stand-in for the autoencoder that it imitates (AutoencoderTiny) | as its config says |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from tim.kinds import CodecKind
from tim.pretrained import weight_files
from tim.pretrained.weight_files import Location, read_config

BATCH_PIXELS = 1024 * 1024  # that go through an autoencoder at once: about 5 GB of activations; never less than one image
TILE = 2048  # pixels; an image with a longer side goes through in overlapping tiles, as the published training did


class Geometry(NamedTuple):
    """factor: pixels per side of a latent cell; channels: of a latent. All that planning and counting have to know of a codec."""

    factor: int
    channels: int


class Latents(NamedTuple):
    """Of every image a latent (C, h, w); where the codec draws latents, `means` is the middle of each and `deviations` its spread."""

    means: list[Tensor]
    deviations: list[Tensor] | None


class Codec(Protocol):
    """Images to latents and back. `is_stochastic`: whether latents have deviations."""

    factor: int
    channels: int
    is_stochastic: bool

    def latents(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image → float32 (C, H/factor, W/factor)."""
        ...

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        ...


class PixelCodec:
    """The image itself as latent, values in [−1, 1]: for small images and for trying things out. Needs no weights."""

    factor = 1
    channels = 3
    is_stochastic = False

    def latents(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image → float32 (3, H, W) in [−1, 1]."""
        return Latents([_to_range(image) for image in images], None)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (3, H, W) per image → uint8 (3, H, W), clipped and rounded to the nearest level."""
        return [_to_levels(latent) for latent in latents]


class Autoencoder:
    """An autoencoder of diffusers, frozen, in float32. Latents are (z − shift) · scale by the factors in its config.

    Images of one size go through together. Everything stays on `device`.
    """

    def __init__(self, network: Any, geometry: Geometry, *, device: torch.device | str = "cpu") -> None:
        self.factor, self.channels = geometry
        self.device = torch.device(device)
        self.is_stochastic = type(network).__name__ == "AutoencoderKL"
        self._network = network.to(self.device).eval().requires_grad_(False)
        self._scale = float(getattr(network.config, "scaling_factor", None) or 1.0)
        self._shift = float(getattr(network.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def latents(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image, sides multiples of `factor` → float32 (C, H/factor, W/factor)."""
        means: dict[int, Tensor] = {}
        deviations: dict[int, Tensor] = {}
        for batch in _alike(images, most=BATCH_PIXELS):
            pixels = torch.stack([_to_range(images[i].to(self.device)) for i in batch])
            self._tile(pixels.shape[-2:], tile=TILE)
            found = self._network.encode(pixels)
            if self.is_stochastic:
                means.update(zip(batch, (found.latent_dist.mean - self._shift) * self._scale, strict=True))
                deviations.update(zip(batch, found.latent_dist.std * self._scale, strict=True))
            else:
                latents = found.latents if hasattr(found, "latents") else found.latent
                means.update(zip(batch, (latents - self._shift) * self._scale, strict=True))
        count = range(len(images))
        return Latents([means[i] for i in count], [deviations[i] for i in count] if self.is_stochastic else None)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        images: dict[int, Tensor] = {}
        for batch in _alike(latents, most=BATCH_PIXELS // self.factor**2):
            cells = torch.stack([latents[i].to(self.device).float() for i in batch]) / self._scale + self._shift
            self._tile([side * self.factor for side in cells.shape[-2:]], tile=TILE)
            images.update((i, _to_levels(image)) for i, image in zip(batch, self._network.decode(cells).sample, strict=True))
        return [images[i] for i in range(len(latents))]

    def _tile(self, size: Sequence[int], *, tile: int) -> None:
        """Have images of this size go through in tiles if they are larger than one; AutoencoderTiny is small enough without."""
        network = self._network
        if hasattr(network, "tile_sample_min_height"):
            network.tile_sample_min_height = network.tile_sample_min_width = tile
            network.tile_sample_stride_height = network.tile_sample_stride_width = tile * 3 // 4
            network.tile_latent_min_height = network.tile_latent_min_width = tile // self.factor
        elif self.is_stochastic:
            network.tile_sample_min_size, network.tile_latent_min_size = tile, tile // self.factor
        else:
            return
        network.use_tiling = max(size) > tile


AUTOENCODERS: dict[str, str] = {"sd-vae": "AutoencoderKL", "kl": "AutoencoderKL", "dc-ae": "AutoencoderDC", "tiny": "AutoencoderTiny"}
CODECS = get_args(CodecKind)
PARTS = ("vae",)  # sub-folders of a pipeline that hold a codec
GEOMETRIES = {"pixel": Geometry(1, 3), "sd-vae": Geometry(8, 4), "dc-ae": Geometry(32, 32)}  # those known without a look at the weights


def geometry(kind: str, path: str | Path | None = None) -> Geometry:
    """What planning has to know of a codec. Raises ValueError for an unknown kind, and where only the weights would say it."""
    if kind in GEOMETRIES:
        return GEOMETRIES[kind]
    return _described(weights_folder(kind, path), kind=kind)


def is_stochastic(kind: str) -> bool:
    """Whether a codec of this kind draws its latents."""
    return AUTOENCODERS.get(kind) == "AutoencoderKL"


def make(kind: str, path: str | Path | None = None, *, device: torch.device | str = "cpu") -> Codec:
    """A codec by name, with the weights at `path` (see `tim.pretrained.weight_files`). Raises ValueError where it cannot be had."""
    if kind == "pixel":
        return PixelCodec()
    found_at = location(kind, path)
    folder = found_at.folder
    found = _described(folder, kind=kind)
    wanted = GEOMETRIES.get(kind, found)
    if found != wanted:
        said, known = (f"{each.factor} pixels per cell and {each.channels} channels" for each in (found, wanted))
        raise ValueError(f"{folder}: has {said}, codec {kind} has {known}: use codec kl for other autoencoders of that class")
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(f"codec {kind} needs diffusers: pip install 'tim[latent]'") from None
    try:
        with weight_files.loadable(found_at, stem="diffusion_pytorch_model", pickle_stem="diffusion_pytorch_model") as (weights, arguments):
            how = {**arguments, "torch_dtype": torch.float32, "output_loading_info": True}
            network, said = getattr(diffusers, AUTOENCODERS[kind]).from_pretrained(weights, **how)
    except weight_files.FAILURES as error:
        raise weight_files.failure(found_at, error, library="diffusers") from error
    if said["missing_keys"]:
        raise ValueError(f"{folder}: its weights lack {min(said['missing_keys'])}: they are of another model than its config")
    return Autoencoder(network, found, device=device)


def weights_folder(kind: str, path: str | Path | None) -> Path:
    """The folder of a codec's weights. Raises ValueError for an unknown kind, without a path, and where there is no such folder."""
    return location(kind, path).folder


def digest(path: str | Path) -> str:
    """What tells the weights at `path` from others: see `tim.pretrained.weight_files.digest`. Raises ValueError where there are none."""
    return weight_files.digest(path, parts=PARTS)


def location(kind: str, path: str | Path | None) -> Location:
    """Where a codec's weights are. Raises ValueError as `weights_folder`."""
    if kind not in CODECS:
        raise ValueError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}")
    if path is None:
        raise ValueError(f"codec {kind} needs its weights: give its path, a folder that diffusers reads or hf://OWNER/NAME")
    return weight_files.locate(path, parts=PARTS)


def _described(folder: Path, *, kind: str) -> Geometry:
    """What the config beside the weights says."""
    config = read_config(folder)
    if config.get("_class_name") != AUTOENCODERS[kind]:
        raise ValueError(f"{folder}: holds {config.get('_class_name')}, codec {kind} is {AUTOENCODERS[kind]}")
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or ()
    return Geometry(2 ** (len(blocks) - 1), int(config["latent_channels"]))


def _to_range(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1


def _to_levels(latent: Tensor) -> Tensor:
    return ((latent.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _alike(items: Sequence[Tensor], *, most: int) -> Iterator[list[int]]:
    """Positions of items of one shape, at most `most` cells together, or one item."""
    shapes: dict[torch.Size, list[int]] = {}
    for position, item in enumerate(items):
        shapes.setdefault(item.shape, []).append(position)
    for shape, positions in shapes.items():
        count = max(1, most // (shape[-2] * shape[-1]))
        yield from (positions[start : start + count] for start in range(0, len(positions), count))
