"""Bytes → upright 8-bit sRGB pixels, or a named rejection: the one normaliser of the project.

`read_image` decodes every pixel, which is how corpora are prepared; `load_image` decodes no more than its target size needs, which is
how training reads them. JPEG goes through libjpeg-turbo without Pillow's copies (simplejpeg), all else through Pillow; resizing is torch's.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageCms, UnidentifiedImageError

from pipeline.errors import one_line

Pixels = NDArray[np.uint8]
ImageFormat = Literal["jpg", "png", "webp"]

REASONS: tuple[str, ...] = ("empty", "not-an-image", "truncated", "too-large")
MAX_DECODE_PIXELS = 180_000_000
WHITE = (255, 255, 255)

# Only formats whose readers are memory-safe libraries: Pillow's EPS reader, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# No picture of this size is drawn with so few bytes; a claim to be one costs seconds of work a byte. Smaller ones cost little anyway.
_BOMB_PIXELS, _BOMB_PIXELS_PER_BYTE = 4096 * 4096, 2000
_JPEG_MAGIC = b"\xff\xd8\xff"
_MAGIC = (_JPEG_MAGIC, b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_JPEG_DAMAGE = ("premature end", "bad huffman code", "corrupt arithmetic code", "instead of rst")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# At how many eighths of its size the decoder may scale a JPEG if that leaves so many times the target size for the final resampling:
# measured over photographs as the least that keeps every one within 38 dB of a full decode. The other eighths are no faster.
_SHRINKS = ((1, 2.0), (2, 2.0), (3, 1.6), (4, 1.6), (5, 1.2))
_MOST_SEGMENTS = 64  # of a JPEG's header; one with more is left to Pillow
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each process decodes pictures of its own
_SRGB_TOLERANCE = 3  # levels of 255 by which a profile may differ from sRGB and still count as sRGB


class Rejection(ValueError):
    """An image that cannot be used: `reason` is one of `REASONS`, `detail` says more for people."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


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
    (height, width), image = _read_header(data, max_decode_pixels=max_decode_pixels)
    if height * width > max(_BOMB_PIXELS, len(data) * _BOMB_PIXELS_PER_BYTE):
        raise Rejection("too-large", detail=f"{len(data)} bytes claim to be {width}x{height} pixels")
    if image is None or _is_clean_jpeg(image):
        pixels = _decode_jpeg(data)
        height, width = pixels.shape[:2]
        return Picture(pixels=pixels, clean=True, format="JPEG", original_height=height, original_width=width, changes=())

    format_name = "JPEG" if image.format == "MPO" else str(image.format)
    orientation = exif_orientation(image)
    if format_name == "TIFF" and orientation >= 5:  # Pillow turns TIFFs, and only those, by itself
        width, height = height, width
    changes = [] if format_name == "JPEG" else [f"from-{format_name.lower()}"]
    with _damage_rejected():
        decoded = Image.fromarray(_decode_jpeg(data)) if format_name == "JPEG" and image.mode == "RGB" else image
        decoded.load()
        orientation = exif_orientation(image)  # once more: a PNG may keep it behind its pixels
    if format_name != "JPEG" and _animated(image):
        changes.append("first-frame")
    decoded, alpha, colour_changes = _to_rgb(decoded, profile=image.info.get("icc_profile") or b"")
    changes += colour_changes
    if alpha is not None:
        decoded = Image.composite(decoded, Image.new("RGB", decoded.size, background), alpha)
        changes.append("alpha-on-white" if background == WHITE else "alpha-on-colour")
    if orientation in _UPRIGHT:
        decoded = decoded.transpose(_UPRIGHT[orientation])
        changes.append(f"orientation-{orientation}")
    return Picture(
        pixels=np.asarray(decoded),
        clean=False,
        format=format_name,
        original_height=height,
        original_width=width,
        changes=tuple(changes),
    )


def load_image(data: bytes | memoryview, *, resize: tuple[int, int], crop: tuple[int, int], flip: bool = False) -> Pixels:
    """Decode, scale to `resize` = (height, width) with antialiasing, and cut the central `crop` = (height, width): (h, w, 3) uint8 sRGB.

    A JPEG is decoded at a fraction of its size as far as that keeps it within 38 dB of a full decode (`_SHRINKS`), which is up to three
    times faster. How the array lies in memory is not said: whoever keeps it copies it anyway. Raises `Rejection`.
    """
    (target_height, target_width), (height, width) = resize, crop
    assert 0 < height <= target_height, (resize, crop)
    assert 0 < width <= target_width, (resize, crop)
    stored = _clean_jpeg_size(data)
    if stored is None:
        pixels = read_image(bytes(data)).pixels
        covered = pixels.shape[:2]
    else:
        pixels, covered = _decode_shrunk(data, stored=stored, target=resize)
    if pixels.shape[:2] != resize:
        pixels = _resize(pixels, size=resize, covered=covered)
    top, left = (target_height - height) // 2, (target_width - width) // 2
    pixels = pixels[top : top + height, left : left + width]
    return pixels[:, ::-1] if flip else pixels


def encode_image(pixels: Pixels, *, format: ImageFormat) -> bytes:
    """(H, W, 3) uint8 → file bytes: `jpg` at quality 95 without chroma subsampling, `png` and `webp` without loss."""
    if format == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=95, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    if format == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    else:
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=50, method=2)
    return buffer.getvalue()


@contextmanager
def _no_pillow_limit() -> Iterator[None]:
    """Pillow's own bomb limit (a process-wide constant) would overrule ours; it is lifted only while one header is read."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


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


def check_size(height: int, width: int, *, max_decode_pixels: int) -> None:
    if height * width > max_decode_pixels:
        raise Rejection("too-large", detail=f"{width}x{height} pixels, the limit is {max_decode_pixels / 1e6:g} megapixels")


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


def _is_clean_jpeg(image: Image.Image) -> bool:
    """Three components, upright, sRGB: every reader shows what the decoder gives."""
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB" or exif_orientation(image) in _UPRIGHT:
        return False
    profile = image.info.get("icc_profile")
    return not profile or _to_srgb(profile, mode="RGB") == "srgb"


@contextmanager
def _damage_rejected() -> Iterator[None]:
    """Whatever a decoder raises once the header was fine: the file is cut off or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Rejection:
        raise
    except MemoryError as error:
        raise Rejection("too-large", detail="not enough memory to decode it") from error
    except Exception as error:
        raise Rejection("truncated", detail=one_line(error)) from error


def _decode_jpeg(data: bytes | memoryview) -> Pixels:
    with _damage_rejected():
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            if any(sign in str(error).lower() for sign in _JPEG_DAMAGE):
                raise
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)  # odd, but all pixels are there


def exif_orientation(image: Image.Image) -> int:
    """How EXIF says that an image has to be turned: 1 for not at all, 5 to 8 where width and height change places."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF of any kind says nothing about the orientation; the pixels are fine
        return 1


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a second frame that cannot be read: the first one is all that is used
        return True


def _to_rgb(image: Image.Image, *, profile: bytes) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """Any mode → RGB in sRGB, and the alpha channel if there is one: image, alpha, names of the changes made."""
    changes: list[str] = []
    alpha: Image.Image | None = None
    if image.mode.startswith("I"):
        image, alpha = _from_sixteen_bits(image)
        changes.append("16-bit")
    elif image.has_transparency_data:
        if image.mode == "P":
            changes.append("palette")
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.convert("RGB")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGB")
        changes.append("palette")
    elif image.mode == "1":
        image = image.convert("L")

    if image.mode in ("L", "CMYK"):
        changes.append("grayscale" if image.mode == "L" else "cmyk")
    elif image.mode == "F":
        raise Rejection("not-an-image", detail="its levels are floating-point numbers, which say nothing of black and white")
    elif image.mode != "RGB":
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise Rejection("not-an-image", detail=f"colour mode {image.mode} has no sRGB equivalent") from error
        changes.append("colour-space")
    if not profile:
        return _as_rgb(image), alpha, changes

    transform = _to_srgb(profile, mode=image.mode)
    if transform == "unusable" and image.mode == "L":  # an RGB profile on a gray image
        image = image.convert("RGB")
        transform = _to_srgb(profile, mode="RGB")
    if isinstance(transform, ImageCms.ImageCmsTransform):
        image = transform.apply(image)
        changes.append("icc-to-srgb")
    elif transform == "unusable":
        changes.append("icc-ignored")
    return _as_rgb(image), alpha, changes


def _as_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # Pillow would copy it


def _from_sixteen_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit gray → 8-bit gray by v / 257, rounded; the one transparent level of a PNG → alpha. (16-bit RGB arrives as its high bytes.)"""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Rejection("not-an-image", detail=f"its levels go from {levels.min()} to {levels.max()}, which is no picture's range")
    scaled = (levels * 255 + 32895) >> 16
    transparent = image.info.get("transparency")
    alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)) if isinstance(transparent, int) else None
    return Image.fromarray(scaled.astype(np.uint8)), alpha


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, *, mode: str) -> ImageCms.ImageCmsTransform | Literal["srgb", "unusable"]:
    """The transform of a profile to sRGB; "srgb" if it would change nothing that counts; "unusable" if it is broken or not for `mode`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "unusable"
    if mode == "RGB":
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        seen = np.asarray(transform.apply(Image.fromarray(grid)))
        if np.abs(seen.astype(int) - grid.astype(int)).max() <= _SRGB_TOLERANCE:
            return "srgb"
    return transform


def _clean_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JPEG which every reader shows as the decoder gives it; None for all else."""
    if bytes(data[:3]) != _JPEG_MAGIC:
        return None
    size, image = _read_header(data, max_decode_pixels=MAX_DECODE_PIXELS)
    return size if image is None or _is_clean_jpeg(image) else None


def _read_header(data: bytes | memoryview, *, max_decode_pixels: int) -> tuple[tuple[int, int], Image.Image | None]:
    """(height, width), within the limit, and the image as Pillow opened it: None for a plain JPEG, which is clean. Raises `Rejection`."""
    size = _plain_jpeg_size(data)
    if size is None:
        image = open_image(data, max_decode_pixels=max_decode_pixels)
        return (image.height, image.width), image
    check_size(*size, max_decode_pixels=max_decode_pixels)
    return size, None


def _plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JFIF file of three components without EXIF, profile or Adobe's marker, sparing it Pillow's slow opening."""
    if bytes(data[:3]) != _JPEG_MAGIC:
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


def _decode_shrunk(data: bytes | memoryview, *, stored: tuple[int, int], target: tuple[int, int]) -> tuple[Pixels, tuple[float, float]]:
    """Decode a clean JPEG at a fraction of its size, if it is large enough for that: pixels, and height and width of the image in them.

    The last row and column may lie partly outside of the image.
    """
    for eighths, margin in _SHRINKS:
        height, width = stored[0] * eighths / 8, stored[1] * eighths / 8
        if height >= margin * target[0] and width >= margin * target[1]:
            least = {"min_height": math.ceil(height), "min_width": math.ceil(width), "min_factor": 8 / eighths}
            try:
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **least), (height, width)
            except ValueError:
                break
    return _decode_jpeg(data), stored


def _resize(pixels: Pixels, *, size: tuple[int, int], covered: tuple[float, float]) -> Pixels:
    """(H, W, 3) → (h, w, 3) of `size` by Lanczos' antialiased window of three lobes: what Pillow computes, vectorised.

    `covered` says how many rows and columns, from the first on, hold the image.
    """
    import torch  # preparing a corpus never resizes, and starts without it

    source = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)[None]  # Pillow's are not
    scales = tuple((wanted + 1e-6) / there for wanted, there in zip(size, covered, strict=True))  # its size is rounded down
    resized = torch.nn.functional.interpolate(source, scale_factor=scales, mode="lanczos", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
