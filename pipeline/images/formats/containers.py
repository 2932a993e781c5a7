"""Headers of the simpler formats: size before anything is allocated, and variants that are decoded correctly."""

from __future__ import annotations

import struct

from pipeline.images.formats.boxes import boxes
from pipeline.images.formats.checked_header import Prepared
from pipeline.images.rejection import check_claim, check_size, damaged, unsupported

GIF_MAGIC = (b"GIF87a", b"GIF89a")
JP2_MAGIC, J2K_MAGIC = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_JP2_COLOURS = {16: "sRGB", 17: "gray"}
_JP2_REFUSED = {12: "CMYK", 14: "CIELab", 18: "sYCC", 20: "e-sRGB", 21: "ROMM-RGB", 24: "e-sYCC"}

_BMP_OS2_HEADERS = (12, 16)  # bytes; without a compression field
_BMP_HEADERS = (*_BMP_OS2_HEADERS, 40, 52, 56, 64, 108, 124)
_BMP_REFUSED = {2: "4-bit run lengths", 4: "JPEG data, or of OS/2's 24-bit run lengths", 5: "PNG data"}  # by compression


def webp_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) in a WebP header, None for other files and truncated headers."""
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


def prepare_webp(data: bytes, *, max_decode_pixels: int) -> Prepared:
    size = webp_size(data)
    if size is None:
        raise damaged("its header is cut off")
    if data[12:16] != b"VP8 " or size[0] * size[1]:
        check_size(*size, max_decode_pixels=max_decode_pixels)
    check_claim(*size, length=len(data))
    return Prepared(data=data)


def prepare_gif(data: bytes, *, max_decode_pixels: int) -> Prepared:
    """Check both the screen and the first frame, which may be larger."""
    if len(data) < 13:
        raise damaged("its header is cut off")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while True:
        mark = data[position : position + 1]
        if mark == b"\x2c":
            break
        if mark == b"\x21":
            position += 2
            while data[position : position + 1] not in (b"", b"\0"):
                position += 1 + data[position]
            position += 1
        elif mark in (b"", b"\x3b"):
            raise damaged("it has no frame")
        else:
            position += 1
    if position + 10 > len(data):
        raise damaged("its first frame is cut off")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
    size = max(height, top + frame_height), max(width, left + frame_width)
    check_size(*size, max_decode_pixels=max_decode_pixels)
    check_claim(*size, length=len(data))
    return Prepared(data=data)


def prepare_jp2(data: bytes, *, max_decode_pixels: int) -> Prepared:
    """Accept what openjpeg and Pillow decode correctly: gray and RGB, optional alpha, 8 or 16 bits, no palette, no subsampling."""
    stream, profile = 0, b""
    try:
        if data.startswith(JP2_MAGIC):
            stream, profile = _jp2_header(data)
        if data[stream : stream + 4] != J2K_MAGIC:
            raise damaged("it has no codestream")
        right, bottom, left, top, *_, count = struct.unpack_from(">IIIIIIIIH", data, stream + 8)
        parts = [struct.unpack_from("BBB", data, stream + 42 + 3 * number) for number in range(min(count, 5))]
    except struct.error as error:
        raise damaged("its header is cut off") from error
    check_size(bottom - top, right - left, max_decode_pixels=max_decode_pixels)
    check_claim(bottom - top, right - left, length=len(data))
    if not 1 <= count <= 4:
        raise unsupported(f"JPEG 2000 of {count} components")
    if len({depth for depth, _, _ in parts}) > 1 or parts[0][0] not in (7, 15):
        raise unsupported(f"JPEG 2000 of {'/'.join(str((depth & 0x7F) + 1) for depth, _, _ in parts)} bits")
    if any(across != 1 or down != 1 for _, across, down in parts):
        raise unsupported("JPEG 2000 with subsampled components")
    if count in (2, 4) and parts[0][0] == 15:
        raise unsupported("JPEG 2000 of 16 bits with alpha")
    return Prepared(data=data, info={"icc_profile": profile} if profile else {})


def _jp2_header(data: bytes) -> tuple[int, bytes]:
    """Offset of the codestream, and the ICC profile. Raises `Rejection` for colours that are not decoded correctly."""
    profile = b""
    for kind, start, end in boxes(data):
        if kind == b"jp2c":
            return start, profile
        if kind != b"jp2h":
            continue
        for inner, first, stop in boxes(data, start=start, end=end):
            if inner in (b"pclr", b"cmap"):
                raise unsupported("JPEG 2000 with a palette")
            if inner == b"colr" and data[first : first + 1] in (b"\2", b"\3"):
                profile = data[first + 3 : stop]
            elif inner == b"colr" and data[first : first + 1] == b"\1":
                (space,) = struct.unpack_from(">I", data, first + 3)
                if space not in _JP2_COLOURS:
                    raise unsupported(f"JPEG 2000 in {_JP2_REFUSED.get(space, f'colour space {space}')}")
    raise damaged("it has no codestream")


def prepare_ppm(data: bytes, *, max_decode_pixels: int) -> Prepared:
    if data[:2] in (b"Pf", b"PF"):
        raise unsupported("its levels are floating-point numbers")
    return Prepared(data=data)


def prepare_bmp(data: bytes, *, max_decode_pixels: int) -> Prepared:
    """Reject BMPs that Pillow reads wrongly or not at all: Pillow 12 garbles 4-bit run lengths."""
    compression = int.from_bytes(data[30:34], "little") if _bmp_header_size(data) not in _BMP_OS2_HEADERS else 0
    if compression in _BMP_REFUSED:
        raise unsupported(f"BMP of {_BMP_REFUSED[compression]}")
    return Prepared(data=data, refusal="BMP layout that Pillow does not support")


def is_bmp(data: bytes) -> bool:
    """Whether a file starts like a BMP: its magic, and a header of a known size."""
    return data.startswith(b"BM") and _bmp_header_size(data) in _BMP_HEADERS


def _bmp_header_size(data: bytes) -> int:
    size = int.from_bytes(data[14:18], "little")
    return size if len(data) >= 14 + size else 0
