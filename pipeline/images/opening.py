"""Open an image: its header is checked, its size within the limit, and nothing of its pixels decoded."""

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
from pipeline.images.formats.prepared import Prepared
from pipeline.images.formats.tiff import TIFF_MAGIC, prepare_tiff
from pipeline.images.rejection import Rejection, check_claim, check_size, damage_rejected, damaged, unsupported

# Only formats whose readers are memory-safe libraries: Pillow's EPS reader, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_OPEN_BRANDS = (b"mif1", b"msf1", b"miaf")  # of AVIF and HEIF alike
_PPM_MAGIC = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF")
_ORIENTATION_TAG = 0x0112
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each process decodes images of its own


@dataclass(frozen=True, slots=True)
class Opened:
    """An image whose header Pillow has read; what else is known of it; and its header, if it is a JPEG."""

    image: ImageFile.ImageFile
    prepared: Prepared
    jpeg: JpegHeader | None = None

    @property
    def format(self) -> str:
        return "JPEG" if self.jpeg else str(self.image.format)


def open_image(data: bytes | memoryview, *, max_decode_pixels: int, length: int | None = None) -> Opened:
    """Read the header only, and check the size that it claims before anything is allocated. Raises `Rejection`.

    `data` may be no more than the header of a JPEG whose file has `length` bytes.
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
    """By its first bytes: the formats that Pillow may take it for, what checks it, and whether it is certainly one of them."""
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
    is_heif = brand in _HEIF_BRANDS or (brand in _OPEN_BRANDS and not _says_avif(data))
    if is_heif:
        return ("HEIF",), _prepare_heif, True
    if brand in _AVIF_BRANDS or brand in _OPEN_BRANDS:
        return ("AVIF",), partial(prepare_media, decoder_crops=False), True
    if is_bmp(data):
        return ("BMP",), prepare_bmp, True
    if data.startswith(_PPM_MAGIC):
        return ("PPM",), prepare_ppm, False
    return _FORMATS, _prepare_nothing, False


def _says_avif(data: bytes) -> bool:
    """Whether the compatible brands of an ISO media file name AVIF."""
    brands = data[16 : min(int.from_bytes(data[:4], "big"), 1024)]
    return any(brands[place : place + 4] in _AVIF_BRANDS for place in range(0, len(brands), 4))


def _prepare_nothing(data: bytes, *, max_decode_pixels: int) -> Prepared:
    del max_decode_pixels
    return Prepared(data=data)


def _prepare_heif(data: bytes, *, max_decode_pixels: int) -> Prepared:
    if not _heif_plugin():
        raise unsupported('HEIF is read where pillow-heif is installed: pip install ".[heif]"')
    return prepare_media(data, max_decode_pixels=max_decode_pixels, decoder_crops=True)


def _open_jpeg(data: bytes, *, length: int, max_decode_pixels: int) -> Opened:
    header = read_jpeg_header(data)
    check_size(header.height, header.width, max_decode_pixels=max_decode_pixels)
    check_claim(header.height, header.width, length=length)
    prepared = Prepared(data=tidy_jpeg(data, header=header) if header.has_junk else data)
    image = _open(prepared.data, formats=("JPEG",), is_known=True, refusal="")
    if (image.height, image.width) != (header.height, header.width):
        raise damaged("its readers disagree about its size")
    return Opened(image=image, prepared=prepared, jpeg=header)


def _open(data: bytes | memoryview, *, formats: tuple[str, ...], is_known: bool, refusal: str) -> ImageFile.ImageFile:
    try:
        with _no_pillow_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=formats)
    except MemoryError as error:
        raise Rejection("too-large", detail="not enough memory to open it") from error
    except Exception as error:  # Pillow's readers raise whatever a broken header leads them into
        if refusal:
            raise unsupported(refusal) from error
        if is_known:
            raise damaged("its header cannot be read") from error
        detail = "no image format begins like this" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise Rejection("not-an-image", detail=detail) from error


def open_again(data: bytes | memoryview, *, format: str) -> ImageFile.ImageFile:
    """Open what has been opened before: an image object is never decoded twice."""
    return _open(data, formats=(format,), is_known=True, refusal="")


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Pillow's own bomb limit (a process-wide constant) would overrule ours; it is lifted only while one header is read."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


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


def exif_orientation(image: Image.Image) -> int:
    """How EXIF says that an image has to be turned: 1 for not at all, 5 to 8 where width and height change places.

    Of a PNG that Pillow opened by itself this decodes the pixels: decode first.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF of any kind says nothing about the orientation; the pixels are fine
        return 1


def animated(opened: Opened) -> bool:
    """Whether the file has further frames."""
    if opened.prepared.animated is not None:
        return opened.prepared.animated
    try:
        return bool(getattr(opened.image, "is_animated", False))
    except Exception:  # a second frame that cannot be read: the first one is all that is used
        return True
