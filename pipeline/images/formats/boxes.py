"""Boxes of ISO media files (AVIF, HEIF): colours, clean aperture and alpha."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

from pipeline.images.formats.checked_header import Encoding, Prepared
from pipeline.images.formats.cicp import cicp_encoding
from pipeline.images.rejection import check_claim, check_size, damaged

_MAX_BOXES = 10_000
_FULL = 4  # bytes of version and flags


@dataclass(frozen=True, slots=True)
class _Items:
    """Content of a `meta` box: the primary item, the properties in order, and the property numbers of each item."""

    primary: int = 0
    properties: tuple[tuple[bytes, bytes], ...] = ()
    owned: dict[int, list[int]] = field(default_factory=dict)

    def of_primary(self) -> list[tuple[bytes, bytes]]:
        return [self.properties[number - 1] for number in self.owned.get(self.primary, ()) if 0 < number <= len(self.properties)]


def boxes(data: bytes, *, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each box. Raises `Rejection` for a truncated box."""
    end = len(data) if end is None else end
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        (length, kind), head = struct.unpack_from(">I4s", data, start), 8
        if length == 1 and start + 16 <= end:
            (length,), head = struct.unpack_from(">Q", data, start + 8), 16
        stop = end if length == 0 else start + length
        if stop < start + head or stop > end:
            raise damaged(f"its box {kind.decode('latin-1')!a} at byte {start} is cut off")
        yield kind, start + head, stop
        start = stop


def prepare_media(data: bytes, *, max_decode_pixels: int, decoder_crops: bool) -> Prepared:
    """Check the header of an AVIF or HEIF file. `decoder_crops`: whether the decoder applies the clean aperture itself."""
    meta, sequence = None, None
    for kind, start, end in boxes(data):
        if kind == b"meta" and meta is None:
            meta = (start + _FULL, end)
        elif kind == b"moov" and sequence is None:
            sequence = (start, end)
    try:
        items = _items(data, *meta) if meta else _Items()
        properties = items.of_primary()
        size = _image_size(properties)
    except (struct.error, IndexError) as error:
        raise damaged("its header cannot be read") from error
    for kind, body in items.properties:
        if kind == b"ispe" and len(body) >= 12:
            check_size(*struct.unpack_from(">II", body, 4)[::-1], max_decode_pixels=max_decode_pixels)
    if size is not None:
        check_claim(*size, length=len(data))
    has_profile = any(kind == b"colr" and body[:4] in (b"prof", b"rICC") for kind, body in properties)
    colour_boxes = [body for kind, body in properties if kind == b"colr" and body[:4] == b"nclx"]
    if meta is None and sequence is not None:
        offset = data.find(b"colrnclx", *sequence)
        colour_boxes = [data[offset + 4 : offset + 15]] if offset >= 0 else []
    has_alpha = any(kind == b"auxC" and b"alpha" in body for kind, body in items.properties)
    return Prepared(
        data=data,
        encoding=_encoding(colour_boxes) if not has_profile else None,
        aperture=None if decoder_crops or size is None else _aperture(properties, size=size),
        refusal="its alpha channel is stored in a form that the decoder does not support" if has_alpha else "",
    )


def _items(data: bytes, start: int, end: int) -> _Items:
    primary, properties, owned = 0, [], {}
    for kind, first, stop in boxes(data, start=start, end=end):
        if kind == b"pitm":
            primary = int.from_bytes(data[first + _FULL : first + _FULL + (4 if data[first] else 2)], "big")
        elif kind == b"iprp":
            for inner, inner_first, inner_stop in boxes(data, start=first, end=stop):
                if inner == b"ipco":
                    properties = [(name, data[a:b]) for name, a, b in boxes(data, start=inner_first, end=inner_stop)]
                elif inner == b"ipma":
                    owned.update(_associations(data[inner_first:inner_stop]))
    return _Items(primary=primary, properties=tuple(properties), owned=owned)


def _associations(body: bytes) -> dict[int, list[int]]:
    """Item → the numbers of its properties, from 1."""
    version, is_wide = body[0], body[3] & 1
    (count,), position = struct.unpack_from(">I", body, _FULL), _FULL + 4
    owned: dict[int, list[int]] = {}
    for _ in range(min(count, _MAX_BOXES)):
        (item,) = struct.unpack_from(">I" if version else ">H", body, position)
        position += 4 if version else 2
        number = body[position]
        position += 1
        numbers = struct.unpack_from(f">{number}{'H' if is_wide else 'B'}", body, position)
        position += number * (2 if is_wide else 1)
        owned[item] = [value & (0x7FFF if is_wide else 0x7F) for value in numbers]
    return owned


def _image_size(properties: list[tuple[bytes, bytes]]) -> tuple[int, int] | None:
    for kind, body in properties:
        if kind == b"ispe":
            width, height = struct.unpack_from(">II", body, _FULL)
            return height, width
    return None


def _encoding(colour_boxes: list[bytes]) -> Encoding | None:
    if not colour_boxes or len(colour_boxes[0]) < 8:
        return None
    primaries, transfer = struct.unpack_from(">HH", colour_boxes[0], 4)
    return cicp_encoding(primaries, transfer=transfer)


def _aperture(properties: list[tuple[bytes, bytes]], *, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """(left, top, width, height) of the clean aperture (ISO/IEC 14496-12, 12.1.4); None if there is none, or no usable one."""
    for kind, body in properties:
        if kind != b"clap" or len(body) < 32:
            continue
        numbers = struct.unpack(">IIIIiIiI", body[:32])
        if not all(numbers[1::2]):
            return None
        width, height, across, down = (Fraction(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True))
        left = floor(across + Fraction(size[1] - 1, 2) - (width - 1) / 2)
        top = floor(down + Fraction(size[0] - 1, 2) - (height - 1) / 2)
        rows, columns = round(height), round(width)
        fits = 0 <= left < left + columns <= size[1] and 0 <= top < top + rows <= size[0]
        return (left, top, columns, rows) if fits else None
    return None
