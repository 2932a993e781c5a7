"""Decode texts written by other tools: byte order mark, stated encoding, or UTF-8; never a replacement character."""

from __future__ import annotations

import codecs
import io
import re
from typing import BinaryIO

from pipeline.corpus.captions import MAX_TEXT_BYTES

_MARKS = (  # UTF-32 first: its mark starts with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_ESCAPE = 0xDC00  # plus a byte: a lone surrogate, which no decoder produces
_ESCAPED = re.compile("[\udc00-\udcff]")
_HANDLER = "tim-escape"


class UndecodableText(ValueError):
    """Text that is not in the expected encoding. The message gives the first offending byte and its position, from 0."""


def check_encoding(name: str) -> str:
    """Return the name of a text encoding. Raises ValueError if Python does not know it."""
    try:
        "".encode(name)
        b"".decode(name)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{name!r} is not an encoding of text; examples: cp1252, latin-1, gbk, shift_jis, utf-16-le") from error
    return name


def decode_text(payload: bytes | memoryview, *, encoding: str = "") -> str:
    """Decode a small text file.

    A byte order mark (UTF-8, UTF-16, UTF-32) takes precedence and is removed; otherwise the text is in `encoding`, or UTF-8. A payload of
    `MAX_TEXT_BYTES` or more may end within a character. Raises UndecodableText.
    """
    payload = bytes(payload)
    codec, mark = _codec(payload[:4], encoding=encoding)
    try:
        return codecs.getincrementaldecoder(codec)("strict").decode(payload[mark:], final=len(payload) < MAX_TEXT_BYTES)
    except UnicodeDecodeError as error:
        raise _undecodable(codec, byte=error.object[error.start], position=mark + error.start, is_stated=bool(encoding)) from error


def open_text(stream: BinaryIO, *, encoding: str = "") -> tuple[io.TextIOWrapper, str]:
    """Decode a stream like `decode_text`. Returns the text stream and the codec. Line ends (`\\n`, `\\r\\n`, `\\r`) are kept.

    Undecodable bytes raise no error: `find_undecodable` finds them in each line.
    """
    head = stream.read(4)
    codec, mark = _codec(head, encoding=encoding)
    return io.TextIOWrapper(io.BufferedReader(_Prefixed(head[mark:], stream), 1 << 16), codec, errors=_HANDLER, newline=""), codec


def find_undecodable(text: str, *, codec: str, is_stated: bool) -> str:
    """The error message for the first undecodable byte in a text from `open_text`, "" if there is none."""
    match = None if text.isascii() else _ESCAPED.search(text)
    if match is None:
        return ""
    position = len(text[: match.start()].encode(codec))
    return str(_undecodable(codec, byte=ord(match[0]) - _ESCAPE, position=position, is_stated=is_stated))


class _Prefixed(io.RawIOBase):
    """A stream with bytes that were already read put back in front."""

    def __init__(self, prefix: bytes, stream: BinaryIO) -> None:
        self._prefix = prefix
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._prefix or self._stream.read(len(buffer))
        self._prefix = b""
        buffer[: len(data)] = data
        return len(data)


def _codec(head: bytes, *, encoding: str) -> tuple[str, int]:
    """(codec, bytes of the byte order mark)"""
    marked = next(((codec, len(mark)) for mark, codec in _MARKS if head.startswith(mark)), None)
    return marked or (encoding or "utf-8", 0)


def _undecodable(codec: str, *, byte: int, position: int, is_stated: bool) -> UndecodableText:
    remedy = "" if is_stated else "; for another encoding: tim prepare … columns.encoding=cp1252"
    return UndecodableText(f"not {codec.upper()} at byte {position} (0x{byte:02x}){remedy}")


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(_ESCAPE + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _escape)
