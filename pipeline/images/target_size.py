"""Decode an image only as far as its target size needs, for training."""

from __future__ import annotations

import math

import simplejpeg

from pipeline.images.decode import is_clean_jpeg, read_image
from pipeline.images.encode import Pixels
from pipeline.images.formats.jpeg import JPEG_MAGIC, decode_jpeg, plain_jpeg_size
from pipeline.images.opening import open_image
from pipeline.images.rejection import MAX_DECODE_PIXELS, check_size

# (eighths, margin): the decoder may scale a JPEG to these eighths if the result is at least margin × the target size. The margins are the
# smallest that kept every measured photograph within 38 dB of a full decode. Other eighths are not faster.
_SHRINKS = ((1, 2.0), (2, 2.0), (3, 1.6), (4, 1.6), (5, 1.2))


def load_image(data: bytes | memoryview, *, resize: tuple[int, int], crop: tuple[int, int], flip: bool = False) -> Pixels:
    """Decode, scale to `resize` = (height, width) with antialiasing, and centre-crop to `crop` = (height, width): (h, w, 3) uint8 sRGB.

    A JPEG is decoded at a fraction of its size if that stays within 38 dB of a full decode (`_SHRINKS`), which is up to three times
    faster. The memory layout of the array is unspecified. Raises `Rejection`.
    """
    stored = _clean_jpeg_size(data)
    if stored is None:
        pixels = resize_and_crop(read_image(bytes(data)).pixels, resize=resize, crop=crop)
    else:
        pixels, covered = _decode_shrunk(data, stored=stored, target=resize)
        pixels = resize_and_crop(pixels, resize=resize, crop=crop, covered=covered)
    return pixels[:, ::-1] if flip else pixels


def resize_and_crop(
    pixels: Pixels, *, resize: tuple[int, int], crop: tuple[int, int], covered: tuple[float, float] | None = None
) -> Pixels:
    """Scale an upright image (H, W, 3) to `resize` with antialiasing, and cut the central `crop`, both (height, width).

    `covered` says how many rows and columns, from the first on, hold the image; all of them by default.
    """
    (target_height, target_width), (height, width) = resize, crop
    assert 0 < height <= target_height, (resize, crop)
    assert 0 < width <= target_width, (resize, crop)
    if pixels.shape[:2] != resize:
        pixels = _resize(pixels, size=resize, covered=pixels.shape[:2] if covered is None else covered)
    top, left = (target_height - height) // 2, (target_width - width) // 2
    return pixels[top : top + height, left : left + width]


def _clean_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG that needs no normalisation; None for any other file. Raises `Rejection`."""
    if bytes(data[:3]) != JPEG_MAGIC:
        return None
    size = plain_jpeg_size(data)
    if size is None:
        opened = open_image(data, max_decode_pixels=MAX_DECODE_PIXELS)
        return (opened.image.height, opened.image.width) if is_clean_jpeg(opened) else None
    check_size(*size, max_decode_pixels=MAX_DECODE_PIXELS)
    return size


def _decode_shrunk(data: bytes | memoryview, *, stored: tuple[int, int], target: tuple[int, int]) -> tuple[Pixels, tuple[float, float]]:
    """Decode a clean JPEG at a fraction of its size if it is large enough. Returns pixels, and height and width of the image in them.

    The last row and column may be partly outside the image.
    """
    for eighths, margin in _SHRINKS:
        height, width = stored[0] * eighths / 8, stored[1] * eighths / 8
        if height >= margin * target[0] and width >= margin * target[1]:
            minimum = {"min_height": math.ceil(height), "min_width": math.ceil(width), "min_factor": 8 / eighths}
            try:
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **minimum), (height, width)
            except ValueError:
                break
    return decode_jpeg(data), stored


def _resize(pixels: Pixels, *, size: tuple[int, int], covered: tuple[float, float]) -> Pixels:
    """(H, W, 3) → (h, w, 3) of `size` by antialiased Lanczos-3, as Pillow does, but vectorised.

    `covered`: number of rows and columns, from the first, that contain the image.
    """
    import torch  # preparing a corpus does not need it

    source = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]  # Pillow's arrays are read-only
    scales = tuple((target + 1e-6) / source_side for target, source_side in zip(size, covered, strict=True))  # torch rounds down
    resized = torch.nn.functional.interpolate(source, scale_factor=scales, mode="lanczos", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
