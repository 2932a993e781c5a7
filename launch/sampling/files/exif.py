"""EXIF blocks with a UserComment, where A1111 puts its text in JPEG, WebP and AVIF.

Built as bytes: Pillow loses an `Exif` object that is used for a second file in PNG and AVIF, and gives the comment the type BYTE, where
EXIF 2.32 says UNDEFINED and piexif, which A1111 reads with, needs it.
"""

from __future__ import annotations

import struct

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
_LONG, _UNDEFINED = 4, 7
_UNICODE, _ASCII, _JIS, _NONE = b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8)


def exif_with_comment(text: str) -> bytes:
    """An EXIF block, from `Exif\\0\\0` on, whose only entry is the text as a UserComment in UTF-16BE, as A1111 writes it."""
    comment = _UNICODE + text.encode("utf-16-be", "replace")
    first = struct.pack(">2sHIHHHIII", b"MM", 42, 8, 1, EXIF_IFD, _LONG, 1, 26, 0)  # its only entry: where the EXIF IFD is
    second = struct.pack(">HHHIII", 1, USER_COMMENT, _UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + first + second + comment


def comment_of(value: object) -> str:
    """The text of a UserComment as Pillow returns it, "" if there is none. Reads UTF-16 of either byte order, UTF-8 and ASCII."""
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        return ""
    kind, rest = value[:8], value[8:]
    if kind == _UNICODE:
        return _utf16(rest)
    if kind in (_ASCII, _JIS, _NONE):
        return rest.decode("utf-8", "replace").rstrip("\0")
    return value.decode("utf-8", "replace").rstrip("\0")


def _utf16(data: bytes) -> str:
    """Most texts are largely ASCII, so more zeros in the even bytes mean big endian; without a zero, tools wrote UTF-8."""
    data = data[: len(data) // 2 * 2] if b"\0" in data else data
    even, odd = data[::2].count(0), data[1::2].count(0)
    if even == odd == 0:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data.decode("utf-16-be", "replace")
    return data.decode("utf-16-be" if even >= odd else "utf-16-le", "replace")
