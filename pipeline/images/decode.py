"""Decode an image in full and normalise it: upright 8-bit sRGB pixels, or a named rejection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.images.colour import to_rgb, to_srgb
from pipeline.images.encode import Pixels
from pipeline.images.jpeg import decode_jpeg, plain_jpeg_size
from pipeline.images.opening import animated, exif_orientation, open_image
from pipeline.images.rejection import MAX_DECODE_PIXELS, Rejection, check_size, damage_rejected

WHITE = (255, 255, 255)
# No image of this size is drawn with so few bytes; a claim to be one costs seconds of work a byte. Smaller ones cost little anyway.
_BOMB_PIXELS, _BOMB_PIXELS_PER_BYTE = 4096 * 4096, 2000
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image: `pixels` is (H, W, 3) uint8, upright, sRGB; `changes` names what was done to get there.

    `clean` says that the bytes are a JPEG which every reader shows as `pixels`, so that they may be kept as they are.
    `original_height` and `original_width` are those of the stored image, before it was turned upright.
    """

    pixels: Pixels
    clean: bool
    format: str
    original_height: int
    original_width: int
    changes: tuple[str, ...]


def read_image(data: bytes, *, max_decode_pixels: int = MAX_DECODE_PIXELS, background: tuple[int, int, int] = WHITE) -> Picture:
    """Decode an image in full and normalise it, what is transparent on the sRGB colour `background`.

    Raises `Rejection`; the pixel limit is checked before anything is decoded.
    """
    (height, width), image = read_header(data, max_decode_pixels=max_decode_pixels)
    if height * width > max(_BOMB_PIXELS, len(data) * _BOMB_PIXELS_PER_BYTE):
        raise Rejection("too-large", detail=f"{len(data)} bytes claim to be {width}x{height} pixels")
    if image is None or is_clean_jpeg(image):
        pixels = decode_jpeg(data)
        height, width = pixels.shape[:2]
        return Picture(pixels=pixels, clean=True, format="JPEG", original_height=height, original_width=width, changes=())

    format_name = "JPEG" if image.format == "MPO" else str(image.format)
    orientation = exif_orientation(image)
    if format_name == "TIFF" and orientation >= 5:  # Pillow turns TIFFs, and only those, by itself
        width, height = height, width
    changes = [] if format_name == "JPEG" else [f"from-{format_name.lower()}"]
    with damage_rejected():
        decoded = Image.fromarray(decode_jpeg(data)) if format_name == "JPEG" and image.mode == "RGB" else image
        decoded.load()
        orientation = exif_orientation(image)  # once more: a PNG may keep it behind its pixels
    if format_name != "JPEG" and animated(image):
        changes.append("first-frame")
    decoded, alpha, colour_changes = to_rgb(decoded, profile=image.info.get("icc_profile") or b"")
    changes += colour_changes
    if alpha is not None:
        decoded = Image.composite(decoded, Image.new("RGB", decoded.size, background), alpha)
        changes.append("alpha-on-white" if background == WHITE else "alpha-on-colour")
    if orientation in UPRIGHT:
        decoded = decoded.transpose(UPRIGHT[orientation])
        changes.append(f"orientation-{orientation}")
    return Picture(
        pixels=np.asarray(decoded),
        clean=False,
        format=format_name,
        original_height=height,
        original_width=width,
        changes=tuple(changes),
    )


def is_clean_jpeg(image: Image.Image) -> bool:
    """Three components, upright, sRGB: every reader shows what the decoder gives."""
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB" or exif_orientation(image) in UPRIGHT:
        return False
    profile = image.info.get("icc_profile")
    return not profile or to_srgb(profile, mode="RGB") == "srgb"


def read_header(data: bytes | memoryview, *, max_decode_pixels: int) -> tuple[tuple[int, int], Image.Image | None]:
    """(height, width), within the limit, and the image as Pillow opened it: None for a plain JPEG, which is clean. Raises `Rejection`."""
    size = plain_jpeg_size(data)
    if size is None:
        image = open_image(data, max_decode_pixels=max_decode_pixels)
        return (image.height, image.width), image
    check_size(*size, max_decode_pixels=max_decode_pixels)
    return size, None
