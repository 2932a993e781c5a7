"""Cache of whole remote shards on a local disk, with a size limit, shared by all processes that use the same folder.

A shard is downloaded once, by the first process that needs it, while the others wait; it appears under its digest when it is complete and
the digest matches. The least recently read shards are evicted first; a shard that is being read stays.

The cache uses `flock`, whose locks end with their process. `locks/NAME` is held while downloading NAME, `locks/room` while evicting, and a
complete shard is locked (shared) while it is read. A killed process or a failed download leaves a file `NAME.part` with a free lock, which
the next eviction removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.storage.remote import read_ranges

_WHOLE, _PART = ".tar", ".part"
_CHUNK_BYTES, _CHUNKS_AT_ONCE = 8 << 20, 4


class ShardFacts(NamedTuple):
    """Size in bytes and sha256 in hexadecimal ("" if unknown) of a shard, from a manifest."""

    bytes: int
    sha256: str


class BadShard(OSError):
    """A shard that is missing, truncated or does not match its manifest."""


class ShardCache:
    """At most `limit` bytes of shards in `folder`."""

    def __init__(self, folder: str | Path, *, limit: int) -> None:
        self._folder = Path(folder)
        self._limit = limit

    def open(self, url: str, *, facts: ShardFacts) -> int | None:
        """A file descriptor of the whole shard, which stays cached until it is closed; None if there is no room for it.

        Raises BadShard if the digest is wrong, and OSError if the download fails.
        """
        (self._folder / "locks").mkdir(parents=True, exist_ok=True)
        name = facts.sha256 or hashlib.sha256(f"{url} {facts.bytes}".encode()).hexdigest()
        descriptor = self._open_whole(name, facts=facts)
        if descriptor is not None:
            return descriptor
        with _locked(self._folder / "locks" / name):
            descriptor = self._open_whole(name, facts=facts)  # another process may have downloaded it
            if descriptor is not None:
                return descriptor
            part = self._folder / (name + _PART)
            if not self._reserve(part, facts.bytes):
                return None
            self._download(url, part, facts=facts)
            descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # before it gets its name, so that it cannot be evicted
            with self._eviction_lock():
                os.replace(part, self._folder / (name + _WHOLE))
            return descriptor

    def _open_whole(self, name: str, *, facts: ShardFacts) -> int | None:
        path = self._folder / (name + _WHOLE)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if not status.st_nlink or status.st_size != facts.bytes:  # evicted before we had the lock, or truncated
            os.close(descriptor)
            return None
        os.utime(path)
        return descriptor

    def _reserve(self, part: Path, size: int) -> bool:
        """Evict shards to make room for a download, and create its file with the final size."""
        with self._eviction_lock():
            part.unlink(missing_ok=True)
            files = [(file.stat(), file) for file in self._folder.iterdir() if file.suffix in (_WHOLE, _PART)]
            excess = sum(stat.st_size for stat, _ in files) + size - self._limit
            for stat, file in sorted(files, key=lambda each: each[0].st_mtime):
                if excess <= 0:
                    break
                if self._remove_unused(file):
                    excess -= stat.st_size
            if excess > 0:
                return False
            with open(part, "wb") as stream:
                stream.truncate(size)
            return True

    def _eviction_lock(self) -> AbstractContextManager[None]:
        """Lock against renaming and removing files."""
        return _locked(self._folder / "locks" / "room")

    def _remove_unused(self, file: Path) -> bool:
        lock = file if file.suffix == _WHOLE else self._folder / "locks" / file.stem
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _download(self, url: str, part: Path, *, facts: ShardFacts) -> None:
        digest = hashlib.sha256()
        starts = range(0, facts.bytes, _CHUNK_BYTES)
        with open(part, "r+b") as stream:
            for i in range(0, len(starts), _CHUNKS_AT_ONCE):
                ranges = [(url, start, min(start + _CHUNK_BYTES, facts.bytes)) for start in starts[i : i + _CHUNKS_AT_ONCE]]
                for chunk in read_ranges(ranges):
                    if isinstance(chunk, FileNotFoundError):
                        raise BadShard(f"{url} is missing: restore it, or set loader.on_bad_shard=skip")
                    if isinstance(chunk, OSError):
                        raise chunk
                    stream.write(chunk)
                    digest.update(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        if facts.sha256 and digest.hexdigest() != facts.sha256:
            raise BadShard(f"{url} does not match its digest in the manifest: restore it, or set loader.on_bad_shard=skip")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
