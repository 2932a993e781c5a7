"""Upright image sizes from the start of a file, without decoding.

`quick_size` parses plain JPEG, PNG and WebP. If EXIF or XMP may rotate the image, or for other formats, `careful_size` uses Pillow. Both
agree with `read_image`; otherwise `quick_size` returns None, and `careful_size` raises a `Rejection`.
"""

from __future__ import annotations

import struct

from pipeline.images.decode import read_image
from pipeline.images.formats.containers import webp_size
from pipeline.images.formats.jpeg import JPEG_MAGIC
from pipeline.images.formats.jpeg_segments import START_OF_SCAN, Peek, walk_segments
from pipeline.images.formats.png import PNG_MAGIC
from pipeline.images.opening import exif_orientation, open_image
from pipeline.images.rejection import MAX_DECODE_PIXELS, Rejection, check_claim, check_size

Size = tuple[int, int]

_ROTATING = (
    b"eXIf",
    b"XML:com.adobe.xmp",
    b"Raw profile type exif",
    b"cICP",
)  # in a PNG: orientation, HDR colours
_TAIL = 1 << 16  # bytes searched for them at the end of a PNG
_LARGEST_FILE = 1 << 30
_FRAME = struct.Struct(">BHH")  # of a JPEG: bits, height, width
_MAX_SEGMENTS = 1000  # in a header; one with more is left to Pillow


def quick_size(peek: Peek, *, length: int) -> Size | None:
    """(height, width) of a plain JPEG, PNG or WebP without rotation; None for other files. Raises `Rejection` if it is too large."""
    head = peek(0, 2048)
    size = None
    if head.startswith(JPEG_MAGIC):
        size, is_plain, _ = _walk_jpeg(peek, head=head)
        size = size if is_plain else None
    elif head.startswith(PNG_MAGIC):
        size = _png_size(peek, head=head, length=length)
    elif head[20:21] and not (head[12:16] == b"VP8X" and head[20] & 0b1100):  # flags: EXIF, XMP
        size = webp_size(head)
    if size is None or not size[0] * size[1]:
        return None
    check_size(*size, max_decode_pixels=MAX_DECODE_PIXELS)
    check_claim(*size, length=length)
    return size


def careful_size(peek: Peek, *, length: int) -> Size:
    """(height, width) of any image that `read_image` reads, upright. Raises `Rejection`."""
    if length > _LARGEST_FILE:
        raise Rejection("too-large", detail=f"{length / 1e9:.1f} GB")
    head = peek(0, 2048)
    end = _walk_jpeg(peek, head=head)[2] if head.startswith(JPEG_MAGIC) else None
    opened = open_image(peek(0, end or length), length=length, max_decode_pixels=MAX_DECODE_PIXELS)
    image = opened.image
    if opened.format not in ("JPEG", "PNG", "WEBP"):
        height, width = read_image(peek(0, length)).pixels.shape[:2]
        return height, width
    return (image.width, image.height) if exif_orientation(image) >= 5 else (image.height, image.width)


def _walk_jpeg(peek: Peek, *, head: bytes) -> tuple[Size | None, bool, int | None]:
    """Stored size, whether no segment can rotate it, and offset of the pixel data; None for what was not found."""
    size, is_plain = None, True
    for kind, start, end, is_adjacent, _ in walk_segments(head, peek=peek, limit=_MAX_SEGMENTS):
        if not is_adjacent:
            break
        if kind in (0xC0, 0xC1, 0xC2) and size is None:
            frame = head[start + 4 : start + 9] if start + 9 <= len(head) else peek(start + 4, 5)
            precision, height, width = _FRAME.unpack(frame.ljust(_FRAME.size, b"\0"))
            size, is_plain = (height, width), is_plain and precision == 8
        elif kind == 0xE1 or (0xC3 <= kind <= 0xCF and kind not in (0xC4, 0xCC)):
            is_plain = False
        elif kind == START_OF_SCAN:
            return size, is_plain, end
    return size, False, None


def _png_size(peek: Peek, *, head: bytes, length: int) -> Size | None:
    position = len(PNG_MAGIC)
    for _ in range(_MAX_SEGMENTS):
        chunk = head[position : position + 40] if position + 40 <= len(head) else peek(position, 40)
        if len(chunk) < 12 or chunk.startswith(_ROTATING, 4) or chunk.startswith(_ROTATING, 8):
            return None
        if chunk[4:8] == b"IDAT":
            break
        position += 12 + int.from_bytes(chunk[:4], "big")
    start = max(position, length - _TAIL)
    tail = peek(start, length - start)
    if head[12:16] != b"IHDR" or any(name in tail for name in _ROTATING):
        return None
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
