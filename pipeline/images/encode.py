"""Encode pixels as an image file."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
ImageFormat = Literal["jpg", "png", "webp"]


def encode_image(pixels: Pixels, *, format: ImageFormat) -> bytes:
    """(H, W, 3) uint8 → file bytes: `jpg` at quality 95 without chroma subsampling, `png` and `webp` lossless."""
    if format == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    if format == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    else:
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return buffer.getvalue()
