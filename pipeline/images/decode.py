"""Decode an image in full and normalise it: upright 8-bit sRGB pixels, or a rejection with its reason."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from pipeline.images.colour import to_rgb, to_srgb
from pipeline.images.encode import Pixels
from pipeline.images.formats.jpeg import decode_whole_jpeg, plain_jpeg_size
from pipeline.images.opening import Opened, animated, exif_orientation, open_again, open_image
from pipeline.images.rejection import MAX_DECODE_PIXELS, check_claim, check_size, damage_rejected, damaged

WHITE = (255, 255, 255)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ENDS_EARLY = ("GIF", "BMP", "PPM")  # formats whose decoder may stop before the last pixel without an error
# In libtiff's messages; its warnings concern intact images.
_FAX_DAMAGE = re.compile(rb"^Fax\w+: (?!Warning)(.*?) of ", re.MULTILINE)
_MAX_MESSAGES = 1 << 16  # bytes


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image: `pixels` is (H, W, 3) uint8, upright, sRGB; `changes` names the conversions.

    `clean`: the file is a JPEG that every reader shows as `pixels`, so its bytes can be kept.
    `original_height` and `original_width`: size as stored, before rotation.
    """

    pixels: Pixels
    clean: bool
    format: str
    original_height: int
    original_width: int
    changes: tuple[str, ...]


def read_image(data: bytes, *, max_decode_pixels: int = MAX_DECODE_PIXELS, background: tuple[int, int, int] = WHITE) -> DecodedImage:
    """Decode an image in full and normalise it; transparency is composited on the sRGB colour `background`.

    Raises `Rejection`; the pixel limit is checked before anything is decoded.
    """
    size = plain_jpeg_size(data)
    if size is not None:
        check_size(*size, max_decode_pixels=max_decode_pixels)
        check_claim(*size, length=len(data))
        pixels, is_sound = decode_whole_jpeg(data, header=None)
        return _finished(Image.fromarray(pixels), is_clean=is_sound, format="JPEG", size=size, changes=[] if is_sound else ["odd-jpeg"])

    opened = open_image(data, max_decode_pixels=max_decode_pixels)
    changes = [] if opened.jpeg else [f"from-{opened.format.lower()}"]
    size = opened.prepared.size or (opened.image.height, opened.image.width)
    is_clean = is_clean_jpeg(opened)
    with damage_rejected():
        decoded, is_sound = _decode_jpeg(opened) if opened.jpeg else (_decode(opened), True)
        if opened.jpeg and not (is_sound and opened.jpeg.is_plain):
            changes.append("odd-jpeg")
        if is_clean:
            return _finished(decoded, is_clean=is_sound, format="JPEG", size=size, changes=changes)
        orientation = exif_orientation(opened.image)
        if not opened.jpeg and animated(opened):
            changes.append("first-frame")
        decoded = _normalised(decoded, opened=opened, changes=changes, background=background)
        if orientation in UPRIGHT:
            decoded = decoded.transpose(UPRIGHT[orientation])
            changes.append(f"orientation-{orientation}")
    return _finished(decoded, is_clean=False, format=opened.format, size=size, changes=changes)


def _finished(image: Image.Image, *, is_clean: bool, format: str, size: tuple[int, int], changes: list[str]) -> DecodedImage:
    return DecodedImage(
        pixels=np.asarray(image), clean=is_clean, format=format, original_height=size[0], original_width=size[1], changes=tuple(changes)
    )


def _normalised(decoded: Image.Image, *, opened: Opened, changes: list[str], background: tuple[int, int, int]) -> Image.Image:
    """Convert to sRGB, composite on the background, crop to the clean aperture. Appends to `changes`."""
    prepared = opened.prepared
    profile = b"" if prepared.overrides_profile else opened.image.info.get("icc_profile") or b""
    decoded, alpha, colour_changes = to_rgb(decoded, profile=profile, encoding=prepared.encoding)
    changes += colour_changes
    if "transparent_colour" in prepared.info:
        alpha = _sixteen_bit_alpha(opened, transparent=prepared.info["transparent_colour"])
    if alpha is not None:
        decoded = Image.composite(decoded, Image.new("RGB", decoded.size, background), alpha)
        changes.append("alpha-on-white" if background == WHITE else "alpha-on-colour")
    if prepared.aperture is not None:
        left, top, width, height = prepared.aperture
        decoded = decoded.crop((left, top, left + width, top + height))
        changes.append("clean-aperture")
    return decoded


def _decode_jpeg(opened: Opened) -> tuple[Image.Image, bool]:
    """The image as stored, and whether the file has no defects."""
    assert opened.jpeg is not None
    pixels, is_sound = decode_whole_jpeg(opened.prepared.data, header=opened.jpeg)
    if opened.jpeg.components == 4:  # checked by libjpeg-turbo; Pillow handles inverted inks
        opened.image.load()
        return opened.image, is_sound
    return Image.fromarray(pixels[..., 0] if opened.jpeg.components == 1 else pixels), is_sound and not opened.jpeg.has_junk


def _decode(opened: Opened) -> Image.Image:
    """Decode. If the decoder may stop early, a second decode onto another background shows whether pixels are missing."""
    image = opened.image
    if image.format not in _ENDS_EARLY:
        with _libtiff_messages() if image.format == "TIFF" else nullcontext():
            image.load()
        return image
    extents = image.tile[0][1] if image.tile else None
    other = open_again(opened.prepared.data, format=str(image.format))
    image.load()
    _load_onto(other, level=255)
    if extents is not None and image.crop(extents).tobytes() != other.crop(extents).tobytes():
        raise damaged("its pixel data ends early")
    return image


@contextmanager
def _libtiff_messages() -> Iterator[None]:
    """Capture libtiff's messages on standard error, and raise `Rejection` for damaged fax data.

    Pillow raises errors for most other damage, but shows a damaged fax as far as it can be read.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # the process has no standard error
        yield
        return
    try:
        with tempfile.TemporaryFile() as messages:
            sys.stderr.flush()
            os.dup2(messages.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(stderr, 2)
            messages.seek(0)
            damage = _FAX_DAMAGE.search(messages.read(_MAX_MESSAGES))
    finally:
        os.close(stderr)
    if damage:
        raise damaged(f"fax compression: {damage[1].decode(errors='replace')}")


def _load_onto(image: ImageFile.ImageFile, *, level: int) -> None:
    """Decode onto a background of `level` instead of 0 or, in a GIF, instead of the transparent index."""
    if getattr(image, "_frame_transparency", None) is not None:
        vars(image)["_frame_transparency"] ^= 0xFF
    else:
        image.im = Image.core.fill(image.mode, image.size, (level,) * Image.getmodebands(image.mode))
    image.load()


def _sixteen_bit_alpha(opened: Opened, *, transparent: tuple[int, int, int]) -> Image.Image:
    """Alpha of a 16-bit RGB PNG. Pillow gives the high bytes; read as little-endian, it gives the low ones."""
    low = open_again(opened.prepared.data, format="PNG")
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
    low.load()
    levels = np.asarray(opened.image).astype(np.uint16) << 8 | np.asarray(low)
    return Image.fromarray(np.where((levels == np.array(transparent, np.uint16)).all(axis=-1), 0, 255).astype(np.uint8))


def is_clean_jpeg(opened: Opened) -> bool:
    """Three components, upright, sRGB, a regular header: every reader shows the same pixels."""
    header, image = opened.jpeg, opened.image
    if header is None or not header.is_plain or header.components != 3 or header.has_junk or exif_orientation(image) in UPRIGHT:
        return False
    profile = image.info.get("icc_profile")
    return not profile or to_srgb(profile, mode="RGB") == "srgb"
