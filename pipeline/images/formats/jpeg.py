"""Decode JPEG with libjpeg-turbo, without Pillow's copies. The header is parsed first, so that only valid files reach a scaled decode."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.formats.jpeg_segments import START_OF_SCAN, walk_segments
from pipeline.images.rejection import damage_rejected, damaged, unsupported

JPEG_MAGIC = b"\xff\xd8\xff"
_MAX_PLAIN_SEGMENTS = 64  # in a header for the quick check
_MAX_SEGMENTS = 100_000
_FRAME = struct.Struct(">BHHB")  # bits, height, width, components
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: Huffman-coded
_CAREFUL_FRAMES = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded progressive"}
_REFUSED_FRAMES = {
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical"),
    0xCB: "lossless arithmetic-coded",
    0xF7: "JPEG-LS",
}
_ODD_SCANS = "invalid sos parameters"  # in files of several scans, libjpeg reports nothing else after this
_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)
_UNSUPPORTED = ("subsampling", "unsupported color", "not supported", "not implemented", "not compiled")


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The header before the first scan. `segments`: (kind, start, end) of each; `scan`: offset of the first scan."""

    height: int
    width: int
    frame: int
    components: int
    segments: tuple[tuple[int, int, int], ...]
    has_junk: bool
    scan: int

    @property
    def is_plain(self) -> bool:
        """Whether it may be decoded at a fraction of its size."""
        return self.frame in _PLAIN_FRAMES


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(height, width) of a JFIF file with three components and no EXIF, profile or Adobe marker; avoids opening it with Pillow."""
    if bytes(data[:3]) != JPEG_MAGIC:
        return None
    data, is_jfif = bytes(data), False
    for kind, start, end, is_adjacent, _ in walk_segments(data, limit=_MAX_PLAIN_SEGMENTS):
        if not is_adjacent or end > len(data):
            return None
        if kind in _PLAIN_FRAMES:
            precision, height, width, components = _FRAME.unpack_from(data.ljust(start + 10, b"\0"), start + 4)
            return (height, width) if is_jfif and precision == 8 and components == 3 and height * width else None
        is_jfif = is_jfif or (kind == 0xE0 and data[start + 4 : start + 8] == b"JFIF")
        if kind in (0xE1, 0xE2, 0xEE) or not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):
            return None
    return None


def read_jpeg_header(data: bytes | memoryview) -> JpegHeader:
    """Parse the segments up to the first scan like libjpeg, which skips junk between them.

    Raises `Rejection` if there is no frame of a supported kind.
    """
    data = bytes(data)
    segments: list[tuple[int, int, int]] = []
    has_junk, frame = False, None
    for kind, start, end, _, follows_junk in walk_segments(data, limit=_MAX_SEGMENTS):
        has_junk = has_junk or follows_junk
        if end > len(data):
            break
        segments.append((kind, start, end))
        if kind == START_OF_SCAN:
            if frame is None:
                break
            return _checked(data, frame=frame, segments=tuple(segments), has_junk=has_junk, scan=start)
        if (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)) or kind == 0xF7:
            if frame is not None:
                raise damaged("it has two frames")
            frame = (kind, start)
    raise damaged("its header is cut off or broken")


def _checked(data: bytes, *, frame: tuple[int, int], segments: tuple[tuple[int, int, int], ...], has_junk: bool, scan: int) -> JpegHeader:
    kind, start = frame
    precision, height, width, components = _FRAME.unpack(data[start + 4 : start + 10].ljust(_FRAME.size, b"\0"))
    if kind in _REFUSED_FRAMES:
        raise unsupported(f"{_REFUSED_FRAMES[kind]} JPEG")
    if precision != 8:
        raise unsupported(f"JPEG of {precision} bits")
    if components not in (1, 3, 4):
        raise unsupported(f"JPEG of {components} components")
    if not height:
        raise unsupported("its height follows its first scan (DNL)")
    return JpegHeader(height=height, width=width, frame=kind, components=components, segments=segments, has_junk=has_junk, scan=scan)


def decode_jpeg(data: bytes | memoryview) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of an intact JPEG with three components. Raises `Rejection`."""
    return decode_whole_jpeg(data, header=None)[0]


def decode_whole_jpeg(data: bytes | memoryview, *, header: JpegHeader | None) -> tuple[NDArray[np.uint8], bool]:
    """(H, W, 3) RGB, (H, W, 1) gray or (H, W, 4) CMYK as stored, by number of components; and whether the file has no defects.

    libjpeg warnings in a scan count as damage. Junk between header segments and odd values in them do not: the file is then decoded with a
    cleaned header. Raises `Rejection`.
    """
    space = {1: "GRAY", 4: "CMYK"}.get(header.components, "RGB") if header else "RGB"
    with damage_rejected():
        try:
            return simplejpeg.decode_jpeg(data, colorspace=space, strict=True), True
        except ValueError as error:
            first = error
        if any(message in str(first).lower() for message in _UNSUPPORTED):
            return _decode_by_pillow(data, header=header), False
        tidy = tidy_jpeg(data, header=read_jpeg_header(data), keeps_metadata=False)
        try:
            return simplejpeg.decode_jpeg(tidy, colorspace=space, strict=True), False
        except ValueError as error:
            if any(message in str(error).lower() for message in _UNSUPPORTED):
                return _decode_by_pillow(tidy, header=header), False
            if _ODD_SCANS not in str(error).lower():
                raise
        return simplejpeg.decode_jpeg(tidy, colorspace=space, strict=False), False


def _decode_by_pillow(data: bytes | memoryview, *, header: JpegHeader | None) -> NDArray[np.uint8]:
    """Decode what turbojpeg's interface does not support, such as unusual subsampling. Detects only truncation."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        pixels = np.asarray(image)
    assert header is None or pixels.shape[:2] == (header.height, header.width)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def tidy_jpeg(data: bytes | memoryview, *, header: JpegHeader, keeps_metadata: bool = True) -> bytes:
    """Remove junk between header segments, and correct the values that libjpeg corrects with a warning.

    `keeps_metadata`: keep segments that are not needed for the pixels, such as an ICC profile.
    """
    data = bytes(data)
    parts = [data[:2]]
    for kind, start, end in header.segments[:-1]:
        if not keeps_metadata and kind in _METADATA:
            continue
        segment = bytearray(data[start:end])
        if kind == 0xE0 and segment[4:8] == b"JFIF" and len(segment) > 10 and segment[9] not in (1, 2):
            segment[9] = 1
        if kind == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16 and segment[15] > 2:
            segment[15] = 1 if header.components == 3 else 2
        parts.append(bytes(segment))
    return b"".join(parts) + _tidy_scans(data[header.scan :], is_sequential=header.frame in (0xC0, 0xC1))


def _tidy_scans(rest: bytes, *, is_sequential: bool) -> bytes:
    """Sequential JPEG has no spectral selection: correct its values in the only scan."""
    if not is_sequential or rest.count(b"\xff\xda") > 1:
        return rest
    end = 2 + int.from_bytes(rest[2:4], "big")
    return rest[: end - 3] + b"\x00\x3f\x00" + rest[end:]
