"""Edits: images to start from (image to image), with masks (inpainting) and new borders (outpainting).

The image is encoded and noised to the time of the first step. With a mask, cells without a masked pixel keep the image's latent in every
step, and the result is composited in pixels: pixels outside the mask are those of the image, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tim.sampling.sampler import Start

FEATHER = 8  # pixels
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of Pillow, all of 8 bits: it clips others


@dataclass(frozen=True, slots=True)
class Edit:
    """An image to start from.

    image: RGB; mask: L, of the same size: white pixels are drawn anew, black ones stay, grey ones are mixed; None: the whole image changes.
    strength: share of the noise range to start at, above 0 (the image itself) up to 1 (noise).
    feather: half the width in pixels of the soft transition inside the mask, which is narrower where the mask is.
    """

    image: Image.Image
    mask: Image.Image | None = None
    strength: float = 0.6
    feather: int = FEATHER

    def checked_size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """The image's width and height. Raises ValueError if others are asked for, or if an argument does not fit."""
        for named, image in (("image to edit", self.image), ("mask", self.mask)):
            if image is not None and not isinstance(image, Image.Image):
                raise ValueError(f"{named}: is {type(image).__name__}; give an image of Pillow, for example Image.fromarray(…)")
            if image is not None and image.mode not in MODES:
                raise ValueError(f"{named} of mode {image.mode}: convert it to 8 bits, an image to RGB and a mask to L")
        own = self.image.size
        asked = (own[0] if width is None else width, own[1] if height is None else height)
        if asked != own:
            raise ValueError(
                f"size {asked[0]}x{asked[1]}: the image to edit has {own[0]}x{own[1]}; leave the size out, or resize the image"
            )
        if self.mask is not None and self.mask.size != own:
            raise ValueError(f"mask of {self.mask.width}x{self.mask.height}: the image to edit has {own[0]}x{own[1]}; give one of its size")
        if not isinstance(self.strength, (int, float)) or not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength}: must be above 0 (the image itself) and at most 1 (noise)")
        if not isinstance(self.feather, int) or self.feather < 0:
            raise ValueError(f"feather {self.feather}: must be a whole number of pixels, 0 for none")
        return own


def outpainting(image: Image.Image, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, feather: int = FEATHER) -> Edit:
    """An edit that extends an image by pixels on each side. Raises ValueError for a negative number, and if all are 0."""
    border = (left, top, right, bottom)
    if min(border) < 0 or not any(border):
        raise ValueError(f"borders {border}: give pixels to add at the left, top, right and bottom, 0 or more, and one above 0")
    pixels = np.asarray(image.convert("RGB"))
    widths = ((top, bottom), (left, right))
    canvas = np.pad(pixels, (*widths, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), widths, constant_values=255)
    return Edit(Image.fromarray(canvas), Image.fromarray(mask), strength=1.0, feather=feather)


class Frame(NamedTuple):
    """Where an image of `width` × `height` pixels lies in the drawn one, whose sides are multiples of the stride: in its middle."""

    width: int
    height: int
    drawn_width: int
    drawn_height: int

    @classmethod
    def around(cls, width: int, height: int, *, stride: int) -> Frame:
        """The smallest frame with sides that are multiples of `stride`."""
        return cls(width, height, -(-width // stride) * stride, -(-height // stride) * stride)

    def crop(self, pixels: Tensor) -> Tensor:
        """The image (…, height, width) of a drawn one (…, drawn_height, drawn_width)."""
        return pixels[..., self._top : self._top + self.height, self._left : self._left + self.width]

    def pad(self, pixels: Tensor) -> Tensor:
        """The drawn image around an image (C, height, width), with its edges repeated."""
        left, top = self._left, self._top
        rows = (torch.arange(self.drawn_height) - top).clamp(0, self.height - 1)
        columns = (torch.arange(self.drawn_width) - left).clamp(0, self.width - 1)
        return pixels[:, rows][:, :, columns]

    @property
    def _left(self) -> int:
        return (self.drawn_width - self.width) // 2

    @property
    def _top(self) -> int:
        return (self.drawn_height - self.height) // 2


def pixels_of(edit: Edit, frame: Frame) -> Tensor:
    """The image of an edit in its frame, uint8 (3, drawn_height, drawn_width), for the codec."""
    return frame.pad(_rgb(edit))


def start_of(edit: Edit, frame: Frame, latent: Tensor) -> Start:
    """The sampler's start, from the latent (C, h, w) of `pixels_of`."""
    if edit.mask is None:
        return Start(latent)
    masked = frame.pad(_alpha(edit)[None])
    cells = F.adaptive_max_pool2d(masked, latent.shape[-2:])[0]
    return Start(latent, (cells == 0).to(latent.device))


def composite(edit: Edit, drawn: Tensor) -> Tensor:
    """The drawn image, uint8 (3, height, width), inside the mask, and the edit's own outside, with a soft transition inside the mask."""
    if edit.mask is None:
        return drawn
    alpha = _feathered(_alpha(edit), edit.feather)
    original = _rgb(edit)
    mixed = (alpha * drawn.float().cpu() + (1 - alpha) * original.float()).round().to(torch.uint8)
    return torch.where(alpha == 0, original, mixed)


def _rgb(edit: Edit) -> Tensor:
    return torch.from_numpy(np.array(edit.image.convert("RGB"))).permute(2, 0, 1)


def _alpha(edit: Edit) -> Tensor:
    """The mask as float32 (H, W) in [0, 1]."""
    assert edit.mask is not None
    return torch.from_numpy(np.array(edit.mask.convert("L"), dtype=np.float32)) / 255


def _feathered(alpha: Tensor, feather: int) -> Tensor:
    """The mask with ramps of 2 · feather pixels inside its borders: unmasked pixels keep 0, and the image's borders have no ramp.

    Parts too narrow for such a ramp get one of half the width, and so on, because they would not be drawn otherwise.
    """
    feather = min(feather, max(alpha.shape))
    ramps, rest = torch.zeros_like(alpha), alpha
    while feather and bool(rest.any()):
        ramp = torch.minimum(_blurred(_eroded(rest, feather), feather), rest)
        ramps = torch.maximum(ramps, ramp)
        reaches = ((ramp >= rest - 1e-4) & (rest > 0)).float()
        rest = torch.where(_dilated(reaches, 3 * feather) > 0, 0, rest)
        feather //= 2
    return torch.maximum(ramps, rest)


def _blurred(alpha: Tensor, radius: int) -> Tensor:
    """Mean over a window of 2 · radius + 1 pixels around each pixel, with the image's borders repeated."""
    window = 2 * radius + 1
    for columns, rows in ((radius, 0), (0, radius)):
        padded = F.pad(alpha[None, None], [columns, columns, rows, rows], mode="replicate")[0, 0]
        dim = 1 if columns else 0
        sums = F.pad(padded.double().cumsum(dim), [1, 0] if columns else [0, 0, 1, 0])
        count = alpha.shape[dim]
        alpha = ((sums.narrow(dim, window, count) - sums.narrow(dim, 0, count)) / window).float()
    return alpha


def _eroded(alpha: Tensor, radius: int) -> Tensor:
    """Minimum over a window of 2 · radius + 1 pixels around each pixel; pixels beyond the image do not count."""
    return -_dilated(-alpha, radius)


def _dilated(alpha: Tensor, radius: int) -> Tensor:
    """Maximum over the same window, of windows that double: pooling takes a time in proportion to the radius."""
    window = 2 * radius + 1
    for dim, borders in enumerate(([0, 0, radius, radius], [radius, radius])):
        alpha, covered = F.pad(alpha, borders, value=-torch.inf), 1
        while covered < window:
            step = min(covered, window - covered)
            count = alpha.shape[dim] - step
            alpha = torch.maximum(alpha.narrow(dim, 0, count), alpha.narrow(dim, step, count))
            covered += step
    return alpha
