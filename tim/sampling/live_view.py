"""Live view: colours of a latent without decoding it, by a linear map that is fitted once per codec by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tim.codecs import Codec
from tim.codecs.load import PARTS
from tim.disk_cache import DiskCache, key
from tim.pretrained import weight_files

CELLS_PER_CHANNEL = 4  # at least, in a fit
_SYNTHETIC_IMAGES, _SYNTHETIC_SIDE = 16, 128  # the side in pixels, or what makes 8 to 16 cells
_DIGITS = 6  # of stored numbers


@dataclass(frozen=True, slots=True)
class LiveView:
    """Colours from 0 to 1 are matrix · cell + offset. matrix: float32 (3, C); offset: float32 (3)."""

    matrix: Tensor
    offset: Tensor

    def rgb(self, latent: Tensor) -> Tensor:
        """Latent (C, h, w), best the clean one that a step estimates → uint8 (3, h, w), one pixel per cell, on the latent's device."""
        matrix, offset = self.matrix.to(latent.device), self.offset.to(latent.device)
        colours = torch.einsum("kc,chw->khw", matrix, latent.float()) + offset[:, None, None]
        return (255 * colours.nan_to_num(0.5)).round().clamp(0, 255).to(torch.uint8)

    def to_json(self) -> dict[str, Any]:
        """As lists of numbers, rounded to six digits."""
        return {
            "matrix": [[_rounded(value) for value in row] for row in self.matrix.tolist()],
            "offset": [_rounded(value) for value in self.offset.tolist()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LiveView:
        """The inverse of `to_json`. Raises ValueError for other content."""
        try:
            view = cls(torch.tensor(content["matrix"], dtype=torch.float32), torch.tensor(content["offset"], dtype=torch.float32))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a live view: {error}") from error
        if view.matrix.ndim != 2 or len(view.matrix) != 3 or view.offset.shape != (3,):
            raise ValueError(f"not a live view: shapes {list(view.matrix.shape)} and {list(view.offset.shape)}")
        return view


def fit(latents: Sequence[Tensor], images: Sequence[Tensor]) -> LiveView:
    """The linear map from each cell to the mean colour of its pixels, with the least squared error.

    latents: (C, h, w) per image; images: uint8 (3, h·factor, w·factor). Raises ValueError for latents that are not finite.
    """
    products, targets = 0.0, 0.0
    for latent, image in zip(latents, images, strict=True):
        channels, height, width = latent.shape
        cells = torch.cat([latent.double().cpu().reshape(channels, -1), torch.ones(1, height * width, dtype=torch.float64)])
        pixels = image.cpu().double().view(3, height, image.shape[1] // height, width, image.shape[2] // width)
        products = products + cells @ cells.T
        targets = targets + cells @ (pixels.mean((2, 4)) / 255).reshape(3, -1).T
    if not isinstance(products, Tensor) or not isinstance(targets, Tensor):
        raise ValueError("a live view is fitted to at least one image")
    if not bool(products.isfinite().all()):
        raise ValueError("the codec's latents are not finite: its weights are damaged")
    solution = (torch.linalg.pinv(products, hermitian=True) @ targets).float()
    return LiveView(solution[:-1].T.contiguous(), solution[-1].contiguous())


def live_view_for(codec: Codec, section: Mapping[str, Any], *, cache: DiskCache | None) -> LiveView:
    """The live view of a codec, from the cache or fitted to synthetic images.

    section: {kind, path} of a model's spec, which `codec` was made from. The pixel codec needs no fit: its latent is the image. Raises
    ValueError for a codec whose latents are not finite.
    """
    if section["kind"] == "pixel":
        return _pixel_view(codec.channels)
    usable = cache if cache is not None and cache.make_folder() else None
    found = usable.read(_name(section, usable)) if usable is not None else None
    if found is not None:
        return LiveView(**found)
    images = synthetic_images(codec)
    view = fit(codec.encode(images).means, images)
    if usable is not None:
        remember(view, section, cache=usable)
    return view


def remember(view: LiveView, section: Mapping[str, Any], *, cache: DiskCache) -> None:
    """Store a live view for later calls of `live_view_for`. section: {kind, path} of its codec."""
    cache.write(_name(section, cache), {"matrix": view.matrix, "offset": view.offset})


def synthetic_images(codec: Codec) -> list[Tensor]:
    """Gradients and patches of many colours, saturated and pale, coarse and fine: uint8 (3, s, s), always the same for a geometry."""
    generator = torch.Generator().manual_seed(0)
    cells = min(16, max(8, _SYNTHETIC_SIDE // codec.factor))
    count = max(_SYNTHETIC_IMAGES, -(-CELLS_PER_CHANNEL * (codec.channels + 1) // cells**2))
    images: list[Tensor] = []
    for number in range(count):
        coarse = 2 ** (1 + number % 4)
        field = torch.rand(3, coarse, coarse, generator=generator)
        if number % 2:  # pale
            field = 0.7 * field.mean(0) + 0.3 * field
        if number // 8 % 2:  # of one colour and low contrast
            field = 0.6 * torch.rand(3, 1, 1, generator=generator) + 0.4 * field
        size = (cells * codec.factor, cells * codec.factor)
        mode = "bilinear" if number // 4 % 2 == 0 else "nearest"
        images.append((255 * torch.nn.functional.interpolate(field[None], size=size, mode=mode)[0]).round().to(torch.uint8))
    return images


def _pixel_view(channels: int) -> LiveView:
    """Values from −1 to 1 to colours: the first three channels, or one as grey."""
    matrix = torch.zeros(3, channels)
    for colour in range(3):
        matrix[colour, min(colour, channels - 1)] = 0.5
    return LiveView(matrix, torch.full((3,), 0.5))


def _name(section: Mapping[str, Any], cache: DiskCache) -> str:
    digest = weight_files.model_digest(section["path"], parts=PARTS, of_file=cache.file_digest)
    return f"live-view-{key(section['kind'], digest)}"


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
