"""Reading parts of shards by offset: the one place that knows where shards lie. A tar is never parsed in training."""

from __future__ import annotations

import os
from collections import OrderedDict


class ShardReader:
    """Positional reads from local files with a bounded cache of open ones. Belongs to one process; opens nothing before the first read."""

    def __init__(self, *, max_open_files: int = 64) -> None:
        self._max_open_files = max_open_files
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, *, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises OSError, also where the file ends before them."""
        descriptor = self._open(path)
        parts: list[bytes] = []
        missing = length
        while missing:
            part = os.pread(descriptor, missing, offset + length - missing)  # returns at most 2 GiB, or fewer bytes after a signal
            if not part:
                raise OSError(f"{path} ends before byte {offset + length}: the shard is cut off, run `tim verify` on its corpus")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _open(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            self._descriptors.move_to_end(path)
            return descriptor
        while len(self._descriptors) >= self._max_open_files:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[path] = descriptor
        return descriptor
