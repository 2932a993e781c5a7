"""Codecs: images to latents and back. The network sees only latents.

| kind | what it is | pixels per cell, channels |
| --- | --- | --- |
| pixel | the image itself; no weights | 1, 3 |
| sd-vae | Stable Diffusion's autoencoder (diffusers' AutoencoderKL), stochastic | 8, 4 |
| kl | any AutoencoderKL, stochastic | from its config |
| dc-ae | the deep compression autoencoder (AutoencoderDC, arXiv 2410.10733) | 32, 32 |
| tiny | a small, fast approximation of another autoencoder (AutoencoderTiny) | from its config |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from tim.model_kinds import CodecKind
from tim.pretrained import weight_files
from tim.pretrained.weight_files import Location, read_config

BATCH_PIXELS = 1024 * 1024  # per autoencoder batch, about 5 GB of activations; at least one image
TILE = 2048  # pixels; an image with a longer side is processed in overlapping tiles, as in the published training


class Geometry(NamedTuple):
    """factor: pixels per side of a latent cell; channels: latent channels. All that planning and counting need from a codec."""

    factor: int
    channels: int


class Latents(NamedTuple):
    """One latent (C, h, w) per image. For a stochastic codec, `means` and `deviations` are those of each latent's distribution."""

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
    """The image itself as latent, values in [−1, 1]: for small images and experiments. Needs no weights."""

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
    """A frozen diffusers autoencoder in float32. Latents are (z − shift) · scale, with the factors from its config.

    Images of the same size are batched. Everything stays on `device`.
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
        for batch in _same_shape(images, max_cells=BATCH_PIXELS):
            pixels = torch.stack([_to_range(images[i].to(self.device)) for i in batch])
            self._set_tiling(pixels.shape[-2:], tile=TILE)
            encoded = self._network.encode(pixels)
            if self.is_stochastic:
                means.update(zip(batch, (encoded.latent_dist.mean - self._shift) * self._scale, strict=True))
                deviations.update(zip(batch, encoded.latent_dist.std * self._scale, strict=True))
            else:
                latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
                means.update(zip(batch, (latents - self._shift) * self._scale, strict=True))
        count = range(len(images))
        return Latents([means[i] for i in count], [deviations[i] for i in count] if self.is_stochastic else None)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        images: dict[int, Tensor] = {}
        for batch in _same_shape(latents, max_cells=BATCH_PIXELS // self.factor**2):
            cells = torch.stack([latents[i].to(self.device).float() for i in batch]) / self._scale + self._shift
            self._set_tiling([side * self.factor for side in cells.shape[-2:]], tile=TILE)
            images.update((i, _to_levels(image)) for i, image in zip(batch, self._network.decode(cells).sample, strict=True))
        return [images[i] for i in range(len(latents))]

    def _set_tiling(self, size: Sequence[int], *, tile: int) -> None:
        """Enable tiling for images larger than a tile. AutoencoderTiny needs none."""
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
PARTS = ("vae",)  # sub-folders of a diffusers pipeline with a codec
GEOMETRIES = {"pixel": Geometry(1, 3), "sd-vae": Geometry(8, 4), "dc-ae": Geometry(32, 32)}  # known without reading the weights


def geometry(kind: str, path: str | Path | None = None) -> Geometry:
    """The geometry of a codec. Raises ValueError for an unknown kind, and if it needs weights that are missing or do not match."""
    if kind in GEOMETRIES:
        return GEOMETRIES[kind]
    return _config_geometry(weights_folder(kind, path), kind=kind)


def is_stochastic(kind: str) -> bool:
    """Whether a codec of this kind samples its latents."""
    return AUTOENCODERS.get(kind) == "AutoencoderKL"


def make(kind: str, path: str | Path | None = None, *, device: torch.device | str = "cpu") -> Codec:
    """A codec by name, with the weights at `path` (see `tim.pretrained.weight_files`). Raises ValueError if it cannot be loaded."""
    if kind == "pixel":
        return PixelCodec()
    source = location(kind, path)
    folder = source.folder
    actual = _config_geometry(folder, kind=kind)
    expected = GEOMETRIES.get(kind, actual)
    if actual != expected:
        has, needs = (f"{each.factor} pixels per cell and {each.channels} channels" for each in (actual, expected))
        raise ValueError(f"{folder}: has {has}, codec {kind} has {needs}: use codec kl for other autoencoders of that class")
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(f"codec {kind} needs diffusers: pip install 'tim[latent]'") from None
    try:
        with weight_files.loadable(source, stem="diffusion_pytorch_model", pickle_stem="diffusion_pytorch_model") as (weights, arguments):
            options = {**arguments, "torch_dtype": torch.float32, "output_loading_info": True}
            network, info = getattr(diffusers, AUTOENCODERS[kind]).from_pretrained(weights, **options)
    except weight_files.FAILURES as error:
        raise weight_files.failure(source, error, library="diffusers") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder}: its weights lack {min(info['missing_keys'])}: weights and config are of different models")
    return Autoencoder(network, actual, device=device)


def weights_folder(kind: str, path: str | Path | None) -> Path:
    """The folder of a codec's weights. Raises ValueError for an unknown kind, a missing path and a missing folder."""
    return location(kind, path).folder


def digest(path: str | Path) -> str:
    """Digest of the weights at `path` (see `tim.pretrained.weight_files.digest`). Raises ValueError if there are none."""
    return weight_files.digest(path, parts=PARTS)


def location(kind: str, path: str | Path | None) -> Location:
    """Location of a codec's weights. Raises ValueError like `weights_folder`."""
    if kind not in CODECS:
        raise ValueError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}")
    if path is None:
        raise ValueError(f"codec {kind} needs its weights: give its path, a folder that diffusers reads or hf://OWNER/NAME")
    return weight_files.locate(path, parts=PARTS)


def _config_geometry(folder: Path, *, kind: str) -> Geometry:
    """The geometry in the config of the weights."""
    config = read_config(folder)
    if config.get("_class_name") != AUTOENCODERS[kind]:
        raise ValueError(f"{folder}: has {config.get('_class_name')}, codec {kind} is {AUTOENCODERS[kind]}")
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or ()
    return Geometry(2 ** (len(blocks) - 1), int(config["latent_channels"]))


def _to_range(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1


def _to_levels(latent: Tensor) -> Tensor:
    return ((latent.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _same_shape(items: Sequence[Tensor], *, max_cells: int) -> Iterator[list[int]]:
    """Batches of positions of items with the same shape: at most `max_cells` cells each, or one item."""
    shapes: dict[torch.Size, list[int]] = {}
    for position, item in enumerate(items):
        shapes.setdefault(item.shape, []).append(position)
    for shape, positions in shapes.items():
        count = max(1, max_cells // (shape[-2] * shape[-1]))
        yield from (positions[start : start + count] for start in range(0, len(positions), count))
