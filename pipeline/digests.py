"""Digests of files and values, as stored in manifests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO


def file_digest(path: Path) -> str:
    """sha256 of a file in hexadecimal. Raises OSError."""
    with open(path, "rb") as stream:
        return stream_digest(stream)


def bytes_digest(data: bytes) -> str:
    """sha256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def stream_digest(stream: BinaryIO) -> str:
    """sha256 in hexadecimal of the rest of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """sha256 in hexadecimal of a value's JSON, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
