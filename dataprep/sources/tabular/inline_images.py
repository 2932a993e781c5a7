"""Images in a text column of a table: data URLs and base64."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

_LONGEST_NAME = 4096  # characters of a path
_SHORTEST = 100  # characters of an image in base64
_ALPHABET = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_BEGINNINGS = (  # of supported image files
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP",
    b"\xff\x0a",
    b"\0\0\0\x0cJXL",
    b"P5",
    b"P6",
)


def embedded_image(text: str) -> bytes | None:
    """The bytes of an image in a text, None for a path or URL. Raises ValueError for other texts."""
    if text[:5].lower() == "data:":
        return _of_data_url(text)
    if len(text) < _SHORTEST:
        return None
    if not _ALPHABET.fullmatch(text):
        if len(text) > _LONGEST_NAME:
            raise ValueError(f"a text of {len(text)} characters is neither a path nor an image in base64")
        return None
    if len(text) <= _LONGEST_NAME and not _begins_an_image(_decode(text[:32])):
        return None
    return _decode(text)


def _of_data_url(text: str) -> bytes:
    header, comma, body = text.partition(",")
    if not comma:
        raise ValueError("a data: URL without a comma before its data")
    return _decode(body) if header.lower().endswith(";base64") else unquote_to_bytes(body)


def _decode(text: str) -> bytes:
    """Decode base64 of either alphabet, with or without padding. Raises ValueError for other texts."""
    joined = "".join(unquote_to_bytes(text).decode("latin-1").split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except ValueError as error:
        raise ValueError(f"an image that is not base64: {error}") from error


def _begins_an_image(data: bytes) -> bool:
    return data.startswith(_BEGINNINGS) or data[4:8] == b"ftyp"
