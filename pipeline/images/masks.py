"""Loss masks: grey images, white where an image is trained, black where it is not, grey for a share of the loss.

A mask belongs to the upright image. It may be smaller or larger, but must have the same aspect ratio.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.decode import UPRIGHT, read_image
from pipeline.images.encode import Pixels
from pipeline.images.rejection import MAX_DECODE_PIXELS

MASK_EXTENSION = "mask.png"
"""Of the member `KEY.mask.png` in a shard."""


class BadMask(ValueError):
    """A mask that cannot be used; the message follows the mask's name."""


def read_mask(data: bytes, *, max_decode_pixels: int = MAX_DECODE_PIXELS) -> Pixels:
    """Decode a mask in full: (H, W) uint8, upright. Colours count by their brightness, transparent pixels as black. Raises `Rejection`."""
    image = read_image(data, max_decode_pixels=max_decode_pixels, background=(0, 0, 0))
    return np.asarray(Image.fromarray(image.pixels).convert("L"))


def place_mask(mask: Pixels, *, size: tuple[int, int], stored: tuple[int, int], orientation: int = 1) -> Pixels:
    """The mask of an upright image of `size` that is stored scaled to `stored`, both (height, width).

    A mask with the shape of the file before its EXIF `orientation` was applied is turned like the image. Raises BadMask if the aspect
    ratio differs, or if the mask is black everywhere.
    """
    if not fits(mask.shape[:2], size) and orientation >= 5 and fits(mask.shape[:2], size[::-1]):
        mask = np.asarray(Image.fromarray(mask).transpose(UPRIGHT[orientation]))
    if not fits(mask.shape[:2], size):
        raise BadMask(f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image {size[1]}x{size[0]}: they need the same aspect ratio")
    _check_white(mask)
    return _resized(mask, stored)


def encode_mask(mask: Pixels) -> bytes:
    """(H, W) uint8 → a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def load_mask(
    data: bytes | memoryview, *, resize: tuple[int, int], crop: tuple[int, int], flip: bool, factor: int, slack: int = 1
) -> NDArray[np.float32]:
    """The share of the loss of each latent cell of an image that `load_image` scales, crops and mirrors with the same arguments.

    (h/factor, w/factor) in [0, 1]: the mean over the cell's pixels. `slack`: pixels by which `resize` may differ from the aspect ratio.
    Raises `Rejection`, and BadMask for another aspect ratio or a mask that is black in the whole crop.
    """
    mask = read_mask(bytes(data))
    if not fits(mask.shape[:2], resize, slack=slack):
        raise BadMask(f"is {mask.shape[1]}x{mask.shape[0]} pixels, its image scales to {resize[1]}x{resize[0]}: another aspect ratio")
    _check_white(mask)
    top, left = (resize[0] - crop[0]) // 2, (resize[1] - crop[1]) // 2
    cut = _resized(mask, resize)[top : top + crop[0], left : left + crop[1]]
    cut = cut[:, ::-1] if flip else cut
    cells = cut.reshape(crop[0] // factor, factor, crop[1] // factor, factor).mean(axis=(1, 3), dtype=np.float32) / np.float32(255)
    if not cells.any():
        raise BadMask("is black in all of the image that is trained")
    return cells


def fits(one: tuple[int, ...], other: tuple[int, ...], *, slack: int = 1) -> bool:
    """Whether two sizes have the same aspect ratio, up to `slack` pixels of rounding a side."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= slack * max(sum(one), sum(other))


def _check_white(mask: Pixels) -> None:
    """Raise BadMask for a mask that is black, or that has 0 and 1 in place of 0 and 255."""
    brightest = int(mask.max())
    if brightest == 0:
        raise BadMask("is black everywhere: nothing of the image would be trained")
    if brightest == 1:
        raise BadMask("is nearly black: its brightest pixel is 1 of 255; write 255 (in a 16-bit file 65535) where the image is trained")


def _resized(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """Scaled to (height, width) by averaging over areas, which keeps white white."""
    if mask.shape == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BOX))
