"""Open an image: check its header and size without decoding pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from PIL import AvifImagePlugin, Image, ImageFile, ImagePalette, UnidentifiedImageError

from pipeline.errors import one_line
from pipeline.images.formats.boxes import prepare_media
from pipeline.images.formats.checked_header import Prepared
from pipeline.images.formats.containers import (
    GIF_MAGIC,
    J2K_MAGIC,
    JP2_MAGIC,
    is_bmp,
    prepare_bmp,
    prepare_gif,
    prepare_jp2,
    prepare_ppm,
    prepare_webp,
)
from pipeline.images.formats.jpeg import JPEG_MAGIC, JpegHeader, read_jpeg_header, tidy_jpeg
from pipeline.images.formats.jxl import JXL_MAGIC, prepare_jxl
from pipeline.images.formats.png import PNG_MAGIC, prepare_png
from pipeline.images.formats.tiff import TIFF_MAGIC, prepare_tiff
from pipeline.images.rejection import Rejection, check_claim, check_size, damage_rejected, damaged, unsupported

# Only formats with safe readers: Pillow's EPS reader, for example, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_OPEN_BRANDS = (b"mif1", b"msf1", b"miaf")  # used by both AVIF and HEIF
_PPM_MAGIC = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF")
_ORIENTATION_TAG = 0x0112
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there are many decoding processes


@dataclass(frozen=True, slots=True)
class Opened:
    """An image whose header Pillow has read, the result of the header check, and the JPEG header if it is one."""

    image: ImageFile.ImageFile
    prepared: Prepared
    jpeg: JpegHeader | None = None

    @property
    def format(self) -> str:
        return "JPEG" if self.jpeg else str(self.image.format)


def open_image(data: bytes | memoryview, *, max_decode_pixels: int, length: int | None = None) -> Opened:
    """Read only the header, and check its size before anything is allocated. Raises `Rejection`.

    `data` may be only the header of a JPEG file of `length` bytes.
    """
    if not data:
        raise Rejection("empty", detail="0 bytes")
    data = bytes(data)
    if data.startswith(JPEG_MAGIC):
        return _open_jpeg(data, length=length or len(data), max_decode_pixels=max_decode_pixels)
    formats, prepare, is_known = _kind(data)
    with damage_rejected():
        prepared = prepare(data, max_decode_pixels=max_decode_pixels)
    image = _open(prepared.data, formats=formats, is_known=is_known, refusal=prepared.refusal)
    check_size(image.height, image.width, max_decode_pixels=max_decode_pixels)
    check_claim(image.height, image.width, length=len(data))
    palette = prepared.info.get("eight_bit_palette")
    if palette:
        image.palette = ImagePalette.raw("RGB;L", palette)
    image.info.update((key, value) for key, value in prepared.info.items() if value is not None)
    for key, value in prepared.info.items():
        if value is None:
            image.info.pop(key, None)
    return Opened(image=image, prepared=prepared)


def _kind(data: bytes) -> tuple[tuple[str, ...], Any, bool]:
    """From the first bytes: candidate formats for Pillow, the function that checks the header, and whether the format is certain."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if data.startswith(PNG_MAGIC):
        return ("PNG",), prepare_png, True
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ("WEBP",), prepare_webp, True
    if data.startswith(GIF_MAGIC):
        return ("GIF",), prepare_gif, True
    if data.startswith(TIFF_MAGIC):
        return ("TIFF",), prepare_tiff, True
    if data.startswith((JP2_MAGIC, J2K_MAGIC)):
        return ("JPEG2000",), prepare_jp2, True
    if data.startswith(JXL_MAGIC):
        return ("JXL",), prepare_jxl, True
    is_heif = brand in _HEIF_BRANDS or (brand in _OPEN_BRANDS and not _has_avif_brand(data))
    if is_heif:
        return ("HEIF",), _prepare_heif, True
    if brand in _AVIF_BRANDS or brand in _OPEN_BRANDS:
        return ("AVIF",), partial(prepare_media, decoder_crops=False), True
    if is_bmp(data):
        return ("BMP",), prepare_bmp, True
    if data.startswith(_PPM_MAGIC):
        return ("PPM",), prepare_ppm, False
    return _FORMATS, _prepare_any, False


def _has_avif_brand(data: bytes) -> bool:
    """Whether the compatible brands of an ISO media file include AVIF."""
    brands = data[16 : min(int.from_bytes(data[:4], "big"), 1024)]
    return any(brands[start : start + 4] in _AVIF_BRANDS for start in range(0, len(brands), 4))


def _prepare_any(data: bytes, *, max_decode_pixels: int) -> Prepared:
    del max_decode_pixels
    return Prepared(data=data)


def _prepare_heif(data: bytes, *, max_decode_pixels: int) -> Prepared:
    if not _heif_plugin():
        raise unsupported('reading HEIF needs pillow-heif: pip install ".[heif]"')
    return prepare_media(data, max_decode_pixels=max_decode_pixels, decoder_crops=True)


def _open_jpeg(data: bytes, *, length: int, max_decode_pixels: int) -> Opened:
    header = read_jpeg_header(data)
    check_size(header.height, header.width, max_decode_pixels=max_decode_pixels)
    check_claim(header.height, header.width, length=length)
    prepared = Prepared(data=tidy_jpeg(data, header=header) if header.has_junk else data)
    image = _open(prepared.data, formats=("JPEG",), is_known=True, refusal="")
    if (image.height, image.width) != (header.height, header.width):
        raise damaged("JPEG readers disagree about its size")
    return Opened(image=image, prepared=prepared, jpeg=header)


def _open(data: bytes | memoryview, *, formats: tuple[str, ...], is_known: bool, refusal: str) -> ImageFile.ImageFile:
    try:
        with _no_pillow_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=formats)
    except MemoryError as error:
        raise Rejection("too-large", detail="not enough memory to open it") from error
    except Exception as error:  # Pillow's readers raise many types for a broken header
        if refusal:
            raise unsupported(refusal) from error
        if is_known:
            raise damaged("its header cannot be read") from error
        detail = "no known image format starts like this" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise Rejection("not-an-image", detail=detail) from error


def open_again(data: bytes | memoryview, *, format: str) -> ImageFile.ImageFile:
    """Open an image a second time, because an image object can be decoded only once."""
    return _open(data, formats=(format,), is_known=True, refusal="")


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own decompression-bomb limit, a process-wide constant, while a header is read: ours applies."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@lru_cache(maxsize=1)
def _heif_plugin() -> bool:
    """Register Pillow's HEIF plugin. Returns whether it is installed."""
    try:
        from pillow_heif import options, register_heif_opener
    except ImportError:
        return False
    options.DECODE_THREADS = 1
    register_heif_opener()
    return True


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation: 1 for upright, 5 to 8 if width and height are swapped.

    For a PNG opened by Pillow itself this decodes the pixels: decode first.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF: treat as upright, the pixels are fine
        return 1


def animated(opened: Opened) -> bool:
    """Whether the file has more than one frame."""
    if opened.prepared.animated is not None:
        return opened.prepared.animated
    try:
        return bool(getattr(opened.image, "is_animated", False))
    except Exception:  # an unreadable second frame; only the first one is used
        return True
