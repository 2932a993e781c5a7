"""Image files written by hand, independent of the decoders under test, and one of every mode that Pillow writes."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Levels = NDArray[np.int64]
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_FORMATS = ("PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG", "JPEG2000", "PPM")
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I;16B", "I", "F")
_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma")
_JPEG_IN_TIFF = ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")


def packed(rows: Levels, *, bits: int, order: str = ">") -> bytes:
    """(rows, values) → bytes, each row beginning with a new one."""
    if bits in (8, 16, 32):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    planes = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(planes.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(levels: Levels, *, bits: int, colour: int, interlace: bool = False, extra: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """(H, W, samples) → PNG; `extra`: chunks in front of its pixels."""

    def rows(part: Levels) -> bytes:
        return b"".join(b"\0" + packed(row.reshape(1, -1), bits=bits) for row in part)

    parts = [levels[y::down, x::across] for x, y, across, down in _PASSES] if interlace else [levels]
    raw = b"".join(rows(part) for part in parts if part.size)
    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, colour, 0, 0, int(interlace))
    chunks = [(b"IHDR", head), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(parts: list[bytes], *, order: str, tags: dict[int, tuple[str, list[int]]]) -> bytes:
    """Strips and tags (tag → kind of number, values) → one page."""
    body, offsets = b"", []
    for part in parts:
        offsets.append(8 + len(body))
        body += part + b"\0" * (len(part) % 2)
    tags = {**tags, 273: ("I", offsets), 279: ("I", [len(part) for part in parts])}
    place = 8 + len(body)
    entries, values, behind = b"", b"", place + 2 + 12 * len(tags) + 4
    for tag in sorted(tags):
        kind, numbers = tags[tag]
        value = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        entries += struct.pack(order + "HHI", tag, {"B": 1, "H": 3, "I": 4}[kind], len(numbers))
        entries += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", behind + len(values))
        values += (value + b"\0" * (len(value) % 2)) if len(value) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", place)
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4) + values


@cache
def every_mode() -> dict[str, bytes]:
    """A small image of every mode of every format that Pillow can write, each as noise and as a smooth gradient; 24 × 20 pixels."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8))
    smooth = noise.resize((6, 5)).resize((24, 20), Image.Resampling.BICUBIC)
    made: dict[str, bytes] = {}
    for name, source in (("noise", noise), ("smooth", smooth)):
        for mode in _MODES:
            image = _as_mode(source, mode)
            for format in _FORMATS:
                ways: list[dict[str, Any]] = [{}, {"transparency": 0}] if format in ("PNG", "GIF") else [{}]
                ways = [{"compression": way} for way in _compressions(mode)] if format == "TIFF" else ways
                for way in ways:
                    data = _saved(image, format, **way)
                    if data:
                        made[" ".join([format, mode, *map(str, way.values()), name])] = data
    return made


def _compressions(mode: str) -> tuple[str, ...]:
    """Of a TIFF in this mode. Only what libtiff can write: where it refuses, Pillow 12 frees its memory twice."""
    return _COMPRESSIONS + ("group3", "group4") * (mode == "1") + ("jpeg",) * (mode in _JPEG_IN_TIFF)


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        return to_lab.apply(image)
    for step in {"La": ("LA",), "RGBa": ("RGBA",), "PA": ("P",), "I;16": ("L", "I"), "I;16B": ("L", "I"), "I": ("L",)}.get(mode, ()):
        image = image.convert(step)
    return image.convert(mode)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """b"" where Pillow does not write it."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return b""
    return buffer.getvalue()
