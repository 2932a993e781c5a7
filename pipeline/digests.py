"""Digests of files, as manifests hold them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO


def file_digest(path: Path) -> str:
    """sha256 of a file in hexadecimal. Raises OSError."""
    with open(path, "rb") as stream:
        return stream_digest(stream)


def stream_digest(stream: BinaryIO) -> str:
    """sha256 in hexadecimal of all that is left of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
