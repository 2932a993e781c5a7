"""Sizes from headers are those of the decoded, upright image."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import Rejection, read_image
from pipeline.images.headers import careful_size, quick_size

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'


def encoded(format: str, *, height: int = 20, width: int = 30, mode: str = "RGB", orientation: int = 0, **options: Any) -> bytes:
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 128).save(buffer, format, **options)
    return buffer.getvalue()


def tiff(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sizes(data: bytes) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    def peek(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    return quick_size(peek, length=len(data)), careful_size(peek, length=len(data))


PLAIN = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "gray jpeg": encoded("JPEG", mode="L"),
    "long headers": encoded("JPEG", comment=b"c" * 60_000, icc_profile=b"p" * 150_000),
    "png": encoded("PNG"),
    "palette": encoded("PNG", mode="P"),
    "webp": encoded("WEBP"),
    "lossless webp": encoded("WEBP", lossless=True),
    "webp with alpha": encoded("WEBP", mode="RGBA"),
}
TURNED = {
    **{f"jpeg {turn}": encoded("JPEG", orientation=turn) for turn in range(1, 9)},
    "jpeg by xmp": encoded("JPEG", xmp=XMP),
    "png": encoded("PNG", orientation=6),
    "webp": encoded("WEBP", orientation=5),
    "webp by xmp": encoded("WEBP", xmp=XMP),
    "gif": encoded("GIF", mode="P"),
    "tiff": encoded("TIFF", orientation=6),
    "bmp": encoded("BMP"),
}
_png = PLAIN["png"]
TURNED["png behind its pixels"] = _png[:-12] + chunk(b"eXIf", tiff(7)) + _png[-12:]
TURNED["png by xmp"] = _png[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + _png[33:]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_images_are_measured_by_their_bytes_alone(name: str) -> None:
    assert sizes(PLAIN[name]) == ((20, 30), (20, 30))
    assert read_image(PLAIN[name]).pixels.shape[:2] == (20, 30)


@pytest.mark.parametrize("name", TURNED)
def test_what_may_be_turned_is_left_to_pillow(name: str) -> None:
    quick, careful = sizes(TURNED[name])
    assert quick is None
    assert careful == read_image(TURNED[name]).pixels.shape[:2]
    if any(sign in name for sign in ("5", "6", "7", "8", "xmp", "behind", "png", "webp", "tiff")):
        assert careful == (30, 20)


@given(st.sampled_from(sorted(PLAIN.values()) + sorted(TURNED.values())), st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_headers_give_a_size_or_a_rejection(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for place in draw.draw(st.lists(st.integers(0, min(len(data), 200) - 1), max_size=4)):
        damaged[place] = draw.draw(st.integers(0, 255))
    cut = bytes(damaged[: draw.draw(st.integers(0, len(data)))])
    try:
        quick, careful = sizes(cut)
    except Rejection:
        return
    assert quick is None or min(quick) > 0
    assert len(careful) == 2


def test_bombs_are_rejected() -> None:
    bomb = PLAIN["png"][:16] + struct.pack(">II", 60_000, 60_000) + PLAIN["png"][24:]
    with pytest.raises(Rejection, match="too-large"):
        sizes(bomb)
