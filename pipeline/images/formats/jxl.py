"""JPEG XL, with the Pillow plugin."""

from __future__ import annotations

from functools import lru_cache

from pipeline.images.formats.boxes import boxes
from pipeline.images.formats.checked_header import Prepared
from pipeline.images.rejection import check_claim, check_size, damaged, unsupported

JXL_MAGIC = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_HEADER_BYTES = 12  # of a codestream, enough for the size
_SIDE_BITS = (9, 13, 18, 30)
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def prepare_jxl(data: bytes, *, max_decode_pixels: int) -> Prepared:
    """Check the size before the plugin decodes everything as it opens the file. Raises `Rejection`."""
    if not jxl_plugin():
        raise unsupported('reading JPEG XL needs pillow-jxl-plugin: pip install ".[jxl]"')
    height, width = jxl_size(data)
    check_size(height, width, max_decode_pixels=max_decode_pixels)
    check_claim(height, width, length=len(data))
    # libjxl applies the orientation of the codestream; EXIF is used only for a recompressed JPEG (ISO/IEC 18181-2).
    holds_jpeg = not data.startswith(JXL_MAGIC[0]) and any(kind == b"jbrd" for kind, _, _ in boxes(data))
    return Prepared(data=data, info={} if holds_jpeg else {"exif": None})


@lru_cache(maxsize=1)
def jxl_plugin() -> bool:
    """Register Pillow's JPEG XL plugin. Returns whether it is installed."""
    try:
        from pillow_jxl import JpegXLImagePlugin
    except ImportError:
        return False
    JpegXLImagePlugin.DECODE_THREADS = 0  # no threads: there are many decoding processes
    return True


def jxl_size(data: bytes) -> tuple[int, int]:
    """(height, width) as stored (ISO/IEC 18181-1, SizeHeader). Raises `Rejection`."""
    stream = data if data.startswith(JXL_MAGIC[0]) else _codestream(data)
    if not stream.startswith(JXL_MAGIC[0]):
        raise damaged("its header is cut off")
    bits, position = int.from_bytes(stream[2:_HEADER_BYTES], "little"), 0

    def take(count: int) -> int:
        nonlocal position
        value = bits >> position & ((1 << count) - 1)
        position += count
        return value

    def side(small: int) -> int:
        return 8 * (take(5) + 1) if small else 1 + take(_SIDE_BITS[take(2)])

    small = take(1)
    height = side(small)
    ratio = _RATIOS.get(take(3))
    return height, side(small) if ratio is None else height * ratio[0] // ratio[1]


def _codestream(data: bytes) -> bytes:
    """The start of the codestream in a container, possibly in parts, as far as needed for the size."""
    stream = b""
    for kind, start, end in boxes(data):
        if kind in (b"jxlc", b"jxlp"):
            stream += data[start + (4 if kind == b"jxlp" else 0) : end]
            if len(stream) >= _HEADER_BYTES:
                break
    return stream
