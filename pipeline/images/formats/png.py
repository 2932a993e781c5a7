"""Check a PNG before Pillow: all checksums and the length of the pixel data. Removes unneeded metadata.

Pillow ignores checksums of pixel data, shows black rows for a truncated stream, and rejects files with large texts.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from pipeline.images.formats.checked_header import Encoding, Prepared
from pipeline.images.formats.cicp import SRGB_PRIMARIES, cicp_encoding
from pipeline.images.rejection import check_claim, check_size, damaged, unsupported

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, x step, y step
_MAX_METADATA = 16 << 20  # bytes of an ICC profile or EXIF, unpacked
_BLOCK = 1 << 20
_EXIF_TEXT, _XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"
_GAMMA_TOLERANCE = 0.05  # like libpng, ignore smaller differences
_USUAL_GAMMA = 1 / 2.2


def prepare_png(data: bytes, *, max_decode_pixels: int) -> Prepared:
    """Check a PNG, except filter types, and reduce it to the chunks that its pixels need. Raises `Rejection`."""
    chunks: dict[bytes, list[memoryview]] = {}
    for kind, body in _chunks(data):
        if not chunks and kind != b"IHDR":
            raise damaged(f"its first chunk is {kind.decode('latin-1')!a}, not IHDR")
        if kind == b"PLTE" and kind in chunks:
            raise damaged("it has two palettes")
        chunks.setdefault(kind, []).append(body)
    header = bytes(chunks[b"IHDR"][0])
    width, height, depth, colour, interlace = _read_header(header)
    check_size(height, width, max_decode_pixels=max_decode_pixels)
    check_claim(height, width, length=len(data))
    if colour == 3 and b"PLTE" not in chunks:
        raise damaged("it has no palette")
    if b"IDAT" not in chunks:
        raise damaged("it has no pixel data")
    _check_pixels(chunks[b"IDAT"], expected=_raw_length(height, width, bits=depth * _SAMPLES[colour], interlace=interlace))

    info = _metadata(chunks)
    needed = [(b"IHDR", header)] + [(kind, bytes(chunks[kind][0])) for kind in (b"PLTE", b"tRNS") if kind in chunks]
    packed = b"".join([*(_chunk(*each) for each in needed), _chunk(b"IDAT", b"".join(chunks[b"IDAT"])), _chunk(b"IEND", b"")])
    encoding, overrides = _encoding(chunks)
    if b"tRNS" in chunks and colour in (0, 2):
        info.update(_transparent_level(bytes(chunks[b"tRNS"][0]), depth=depth, colour=colour))
    frames = chunks.get(b"acTL")
    return Prepared(
        data=PNG_MAGIC + packed,
        info=info,
        encoding=encoding,
        overrides_profile=overrides,
        animated=frames is not None and len(frames[0]) == 8 and int.from_bytes(frames[0][:4], "big") > 1,
        size=(height, width),
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, content) of every chunk before IEND, with verified checksums. Data after IEND is ignored."""
    view, position = memoryview(data), len(PNG_MAGIC)
    while True:
        head = bytes(view[position : position + 8])
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = position + 12 + length
        if len(head) < 8 or end > len(data):
            raise damaged("it is cut off")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise damaged(f"the checksum of its chunk {kind.decode('latin-1')!a} at byte {position} is wrong")
        if kind == b"IEND":
            return
        yield kind, view[position + 8 : end - 4]
        position = end


def _read_header(header: bytes) -> tuple[int, int, int, int, int]:
    """Width, height, bits of a sample, colour type, interlace method."""
    if len(header) != 13:
        raise damaged(f"its IHDR has {len(header)} bytes")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise damaged(
            f"its IHDR says colour type {colour}, {depth} bits, compression {compression}, filter {filtering}, interlace {interlace}"
        )
    return width, height, depth, colour, interlace


def _raw_length(height: int, width: int, *, bits: int, interlace: int) -> int:
    """Bytes of all rows including filter types."""
    if not interlace:
        return height * (1 + (width * bits + 7) // 8)
    total = 0
    for left, top, across, down in _PASSES:
        columns, rows = (width - left + across - 1) // across, (height - top + down - 1) // down
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total


def _check_pixels(parts: list[memoryview], *, expected: int) -> None:
    """Raise `Rejection` if the stream is damaged or ends before the last row."""
    stream, length = zlib.decompressobj(), 0
    try:
        for part in parts:
            rest: bytes | memoryview = part
            while rest and length <= expected + _BLOCK:
                length += len(stream.decompress(rest, _BLOCK))
                rest = stream.unconsumed_tail
    except zlib.error as error:
        raise damaged(f"its pixel data: {error}") from error
    if length < expected or not (stream.eof or length > expected):
        raise damaged(f"its pixel data ends after {length} of {expected} bytes")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _metadata(chunks: dict[bytes, list[memoryview]]) -> dict[str, Any]:
    """Profile and orientation with Pillow's keys. Omits damaged or too large ones."""
    info: dict[str, Any] = {}
    if b"iCCP" in chunks:
        _, _, packed = bytes(chunks[b"iCCP"][0]).partition(b"\0")
        info["icc_profile"] = _unpacked(packed[1:]) or b"unreadable"
    if b"eXIf" in chunks:
        info["exif"] = b"Exif\0\0" + bytes(chunks[b"eXIf"][0])
    for kind in (b"tEXt", b"zTXt", b"iTXt"):
        for body in chunks.get(kind, ()):
            key, _, text = bytes(body[: len(_EXIF_TEXT) + 1]).partition(b"\0")[0], b"", bytes(body)
            if key == _EXIF_TEXT and kind != b"iTXt":
                rest = text[len(key) + 1 :]
                info["Raw profile type exif"] = (rest if kind == b"tEXt" else _unpacked(rest[1:]) or b"").decode("latin-1")
            elif key == _XMP_TEXT and kind == b"iTXt":
                info["xmp"] = _international_text(text[len(key) + 1 :])
    return info


def _international_text(rest: bytes) -> bytes:
    """The text of an iTXt chunk after its keyword."""
    is_packed = rest[:1] == b"\1"
    parts = rest[2:].split(b"\0", 2)
    text = parts[2] if len(parts) == 3 else b""
    return (_unpacked(text) or b"") if is_packed else text


def _unpacked(packed: bytes) -> bytes | None:
    """Decompress metadata; None if it is damaged or too large."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(packed, _MAX_METADATA)
    except zlib.error:
        return None
    return text if stream.eof else None


def _encoding(chunks: dict[bytes, list[memoryview]]) -> tuple[Encoding | None, bool]:
    """The colour encoding, and whether it overrides a profile. cICP precedes a profile; gAMA and cHRM are used only without sRGB."""
    if b"cICP" in chunks and len(chunks[b"cICP"][0]) == 4:
        primaries, transfer, matrix, full_range = bytes(chunks[b"cICP"][0])
        if matrix or full_range != 1:
            raise unsupported("its cICP chunk specifies narrow range, or not RGB")
        return cicp_encoding(primaries, transfer=transfer), True
    if b"sRGB" in chunks or b"iCCP" in chunks:
        return None, False
    gamma = int.from_bytes(chunks[b"gAMA"][0], "big") / 100_000 if b"gAMA" in chunks and len(chunks[b"gAMA"][0]) == 4 else 0.0
    corners = [value / 100_000 for value in struct.unpack(">8I", chunks[b"cHRM"][0])] if len(chunks.get(b"cHRM", [b""])[0]) == 32 else []
    white_first = (*corners[2:], *corners[:2]) if corners and all(0 < value < 1 for value in corners[1::2]) else SRGB_PRIMARIES
    is_usual = not 0.01 <= gamma <= 100 or abs(gamma / _USUAL_GAMMA - 1) < _GAMMA_TOLERANCE
    same = max(abs(a - b) for a, b in zip(white_first, SRGB_PRIMARIES, strict=True)) < 0.002
    if is_usual and same:
        return None, False
    return Encoding(primaries=white_first, transfer="srgb" if is_usual else 1 / gamma), False  # type: ignore[arg-type]


def _transparent_level(body: bytes, *, depth: int, colour: int) -> dict[str, Any]:
    """The transparent level or colour in terms of Pillow's pixels; None if no pixel can have it."""
    if len(body) != (2 if colour == 0 else 6):
        return {"transparency": None}
    levels = struct.unpack(f">{len(body) // 2}H", body)
    if max(levels) >= 1 << depth:
        return {"transparency": None}
    if colour == 0:
        return {"transparency": levels[0] if depth == 16 else levels[0] * (255 // ((1 << depth) - 1))}
    return {"transparent_colour": levels} if depth == 16 else {"transparency": levels}
