"""JPEG through libjpeg-turbo, without Pillow's copies."""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.images.rejection import damage_rejected

JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_DAMAGE = ("premature end", "bad huffman code", "corrupt arithmetic code", "instead of rst")
_MOST_SEGMENTS = 64  # of a JPEG's header; one with more is left to Pillow


def decode_jpeg(data: bytes | memoryview) -> NDArray[np.uint8]:
    with damage_rejected():
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            if any(sign in str(error).lower() for sign in _JPEG_DAMAGE):
                raise
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)  # odd, but all pixels are there


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JFIF file of three components without EXIF, profile or Adobe's marker, sparing it Pillow's slow opening."""
    if bytes(data[:3]) != JPEG_MAGIC:
        return None
    position, is_jfif = 2, False
    for _ in range(_MOST_SEGMENTS):
        head = bytes(data[position : position + 10])
        if len(head) < 10 or head[0] != 0xFF:
            return None
        kind = head[1]
        if kind in (0xC0, 0xC1, 0xC2):  # sequential or progressive
            is_plain = is_jfif and head[4] == 8 and head[9] == 3
            size = (head[5] << 8 | head[6], head[7] << 8 | head[8])
            return size if is_plain and size[0] * size[1] else None
        is_jfif = is_jfif or (kind == 0xE0 and head[4:8] == b"JFIF")
        if kind in (0xE1, 0xE2, 0xEE) or not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):
            return None
        position += 2 + (head[2] << 8 | head[3])
    return None
