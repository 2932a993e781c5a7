"""Walk the segments of a JPEG header, of a file in memory or behind range reads."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

Peek = Callable[[int, int], bytes]
"""(offset in the file, length) → that many bytes, or fewer where the file ends."""
Segment = tuple[int, int, int, bool, bool]
"""Kind, start and end of a segment; whether it directly follows the one before, and whether other bytes than fill bytes (0xFF) lie
between them. `end` may lie beyond the end of the file."""

START_OF_SCAN = 0xDA
_HEAD = struct.Struct(">BBH")  # 0xFF, kind, length
_BLOCK = 1 << 16  # bytes searched at once for the next marker
_MAX_FALSE_MARKERS = 100_000


def walk_segments(data: bytes, *, peek: Peek | None = None, limit: int) -> Iterator[Segment]:
    """At most `limit` segments up to the first scan, skipping what lies between them as libjpeg does.

    `data` is the file, or its start if `peek` reads the rest. Ends early where there is no further segment.
    """
    position = 2
    for _ in range(limit):
        start, has_junk = position, False
        mark, kind, length = _read_head(data, position, peek)
        if mark != 0xFF or not _is_header_marker(kind):
            found = _next_marker(peek or (lambda offset, count: data[offset : offset + count]), position)
            if found is None:
                return
            start, has_junk = found
            _, kind, length = _read_head(data, start, peek)
        if length < 2 or kind in (0xD8, 0xD9):
            return
        end = start + 2 + length
        yield kind, start, end, start == position, has_junk
        if kind == START_OF_SCAN:
            return
        position = end


def _read_head(data: bytes, position: int, peek: Peek | None) -> tuple[int, int, int]:
    if position + _HEAD.size <= len(data):
        return _HEAD.unpack_from(data, position)
    rest = data[position : position + _HEAD.size] if peek is None else peek(position, _HEAD.size)
    return _HEAD.unpack(rest.ljust(_HEAD.size, b"\0"))


def _is_header_marker(kind: int) -> bool:
    return 0xC0 <= kind <= 0xFE and not 0xD0 <= kind <= 0xD7


def _next_marker(peek: Peek, position: int) -> tuple[int, bool] | None:
    """Offset of the next marker that a header may hold, and whether junk precedes it; None if there is none."""
    has_junk = False
    for _ in range(_MAX_FALSE_MARKERS):
        while (offset := (block := peek(position, _BLOCK)).find(b"\xff")) < 0:
            if len(block) < _BLOCK:
                return None
            has_junk, position = True, position + len(block)
        has_junk, position = has_junk or offset > 0, position + offset
        while (follower := peek(position + 1, 1)) == b"\xff":
            position += 1
        if not follower:
            return None
        if _is_header_marker(follower[0]):
            return position, has_junk
        has_junk, position = True, position + 2
    return None
