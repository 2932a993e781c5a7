"""Normalise images that another library decoded, as `pipeline.images.decode` normalises files."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from pipeline.images.colour import to_rgb
from pipeline.images.decode import UPRIGHT, WHITE, read_image
from pipeline.images.encode import Pixels
from pipeline.images.opening import exif_orientation
from pipeline.images.rejection import MAX_DECODE_PIXELS, check_size, damage_rejected, unsupported


def to_pixels(image: Any) -> Pixels:
    """An image in any of webdataset's forms → (H, W, 3) uint8, upright, sRGB, what is transparent on white.

    Forms: the bytes of a file, a PIL image, or an array (H, W) or (H, W, C) or torch tensor (H, W) or (C, H, W) with 1, 3 or 4 channels, of
    uint8 or of floating-point numbers from 0 to 1. Raises `Rejection`.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return read_image(bytes(image)).pixels
    opened = image if isinstance(image, Image.Image) else Image.fromarray(_levels(image))
    check_size(opened.height, opened.width, max_decode_pixels=MAX_DECODE_PIXELS)
    with damage_rejected():
        opened.load()
        rgb, alpha, _ = to_rgb(opened, profile=opened.info.get("icc_profile") or b"", encoding=None)
        if alpha is not None:
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, WHITE), alpha)
        orientation = exif_orientation(opened)
        return np.asarray(rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb)


def _levels(image: Any) -> Pixels:
    """(H, W), (H, W, 3) or (H, W, 4) uint8 of an array or tensor."""
    is_tensor = hasattr(image, "numpy")
    levels = np.asarray(image.detach().cpu() if is_tensor else image)
    if is_tensor and levels.ndim == 3:
        levels = levels.transpose(1, 2, 0)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[..., 0]
    if not levels.size or levels.ndim not in (2, 3) or (levels.ndim == 3 and levels.shape[2] not in (3, 4)):
        raise unsupported(f"an array of shape {levels.shape} is not an image: expected (H, W), (H, W, C) or, of torch, (C, H, W)")
    if np.issubdtype(levels.dtype, np.floating):
        if not (levels.min() >= 0 and levels.max() <= 1):
            raise unsupported(f"its levels go from {levels.min():g} to {levels.max():g}, expected 0 to 1")
        levels = np.rint(levels * 255).astype(np.uint8)
    if levels.dtype != np.uint8:
        raise unsupported(f"an array of {levels.dtype}, expected uint8, or floating-point numbers from 0 to 1")
    return np.ascontiguousarray(levels)
