"""Open an image with Pillow: its header only, its size within the limit."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from pipeline.errors import one_line
from pipeline.images.jpeg import JPEG_MAGIC
from pipeline.images.rejection import Rejection, check_size

# Only formats whose readers are memory-safe libraries: Pillow's EPS reader, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAGIC = (JPEG_MAGIC, b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_ORIENTATION_TAG = 0x0112
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each process decodes images of its own


def open_image(data: bytes | memoryview, *, max_decode_pixels: int) -> Image.Image:
    """Read the header only, and check the size that it claims. Raises `Rejection`."""
    if not data:
        raise Rejection("empty", detail="0 bytes")
    claimed = webp_size(data)  # Pillow's WebP reader allocates the whole canvas as soon as it opens a file
    if claimed is not None:
        check_size(*claimed, max_decode_pixels=max_decode_pixels)
    formats = (*_FORMATS, "HEIF") if _brand(data) in _HEIF_BRANDS and _heif_plugin() else _FORMATS
    try:
        with _no_pillow_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
    except MemoryError as error:
        raise Rejection("too-large", detail="not enough memory to open it") from error
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them into
        if claimed is not None or bytes(data[:8]).startswith(_MAGIC) or _brand(data) in _AVIF_BRANDS or "HEIF" in formats:
            raise Rejection("truncated", detail="its header cannot be read") from error
        detail = "no image format begins like this" if isinstance(error, UnidentifiedImageError) else one_line(error)
        if _brand(data) in _HEIF_BRANDS:
            detail = "HEIF is read with pillow-heif alone: pip install 'tim[heif]'"
        raise Rejection("not-an-image", detail=detail) from error
    check_size(image.height, image.width, max_decode_pixels=max_decode_pixels)
    return image


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Pillow's own bomb limit (a process-wide constant) would overrule ours; it is lifted only while one header is read."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _brand(data: bytes | memoryview) -> bytes:
    """What kind of ISO media file it says that it is, such as AVIF or HEIF; b"" for all other files."""
    return bytes(data[8:12]) if bytes(data[4:8]) == b"ftyp" else b""


@lru_cache(maxsize=1)
def _heif_plugin() -> bool:
    """Whether Pillow reads HEIF from now on: only if its plugin is installed."""
    try:
        from pillow_heif import options, register_heif_opener
    except ImportError:
        return False
    options.DECODE_THREADS = 1
    register_heif_opener()
    return True


def webp_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) that a WebP header claims, None for other files and for headers that are cut off."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return height & 0x3FFF, width & 0x3FFF


def exif_orientation(image: Image.Image) -> int:
    """How EXIF says that an image has to be turned: 1 for not at all, 5 to 8 where width and height change places."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF of any kind says nothing about the orientation; the pixels are fine
        return 1


def animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a second frame that cannot be read: the first one is all that is used
        return True
