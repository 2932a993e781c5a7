"""Read byte ranges of local and remote shards. A tar is never parsed in training.

Nearby ranges of a shard are read as one, in the order of their offsets. Local shards are read with `pread`; remote ones by concurrent
range requests, or downloaded whole into a local cache (`pipeline.storage.shard_cache`).
"""

from __future__ import annotations

import os
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.digests import stream_digest
from pipeline.storage.remote import is_remote, read_ranges, size_of
from pipeline.storage.shard_cache import BadShard, ShardCache, ShardFacts

__all__ = ["BadShard", "ByteRange", "ShardCache", "ShardFacts", "ShardReader"]

_LOCAL_GAP, _REMOTE_GAP = 16 << 10, 256 << 10  # maximum bytes between two ranges that are read as one
_SPAN_BYTES = 64 << 20  # maximum of merged ranges
_REMEDY = "restore the file, or set loader.on_bad_shard=skip"


class ByteRange(NamedTuple):
    """`length` bytes at byte `offset` of the shard at `path`, a file or a URL."""

    path: str
    offset: int
    length: int


class _Span(NamedTuple):
    """Bytes of a shard that are read at once, and the indices of the requested ranges in them."""

    start: int
    end: int
    parts: list[int]


class ShardReader:
    """Read from shards with a bounded number of open files. Belongs to one process; opens nothing before the first read.

    Args:
        facts: sizes and digests of shards from the manifests, by path; other shards are not checked.
        cache: cache of remote shards; without one they are read by range requests.
        verify: check the digest of a local shard before its first read.
    """

    def __init__(
        self,
        *,
        facts: Mapping[str, ShardFacts] | None = None,
        cache: ShardCache | None = None,
        verify: bool = False,
        max_open_files: int = 64,
    ) -> None:
        self._facts = facts or {}
        self._cache = cache
        self._verify = verify
        self._max_open_files = max_open_files
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._verified: set[str] = set()

    def read(self, path: str, *, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises BadShard if the shard is too short, and OSError."""
        data = self.read_parts([ByteRange(path, offset, length)])[0]
        if isinstance(data, OSError):
            raise data
        return bytes(data)

    def read_parts(self, parts: Sequence[ByteRange]) -> list[memoryview | OSError]:
        """Bytes or an error for each range: BadShard if its whole shard is unusable, another OSError otherwise."""
        results: list[memoryview | OSError] = [memoryview(b"")] * len(parts)
        by_path: dict[str, list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            by_path[part.path].append(i)
        by_range: list[tuple[str, _Span]] = []
        for path in random.sample(list(by_path), len(by_path)):  # so that processes that start together download different shards first
            wanted = by_path[path]
            try:
                if is_remote(path):
                    by_range += [(path, span) for span in self._read_remote(path, parts, wanted=wanted, results=results)]
                else:
                    self._read_spans(self._open(path), parts, wanted=wanted, results=results)
            except OSError as error:
                for i in wanted:
                    results[i] = error
        answers = read_ranges([(path, span.start, span.end) for path, span in by_range])
        for (_, span), answer in zip(by_range, answers, strict=True):
            _distribute(answer, span=span, parts=parts, results=results)
        return results

    def close(self) -> None:
        """Close all files; a later read reopens them."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _read_remote(
        self, path: str, parts: Sequence[ByteRange], *, wanted: Sequence[int], results: list[memoryview | OSError]
    ) -> Iterator[_Span]:
        """Read from the cache, or yield the spans to request if the shard is not cached."""
        if self._cache is not None and path in self._facts:
            descriptor = self._cache.open(path, facts=self._facts[path])
            if descriptor is not None:
                try:
                    self._read_spans(descriptor, parts, wanted=wanted, results=results)
                finally:
                    os.close(descriptor)  # allows eviction from the cache
                return
        self._check_remote_size(path)
        yield from _spans(parts, wanted=wanted, gap=_REMOTE_GAP)

    def _read_spans(
        self, descriptor: int, parts: Sequence[ByteRange], *, wanted: Sequence[int], results: list[memoryview | OSError]
    ) -> None:
        for span in _spans(parts, wanted=wanted, gap=_LOCAL_GAP):
            try:
                answer = _pread(descriptor, start=span.start, end=span.end, path=parts[span.parts[0]].path)
            except OSError as error:
                answer = error
            _distribute(answer, span=span, parts=parts, results=results)

    def _open(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            self._descriptors.move_to_end(path)
            return descriptor
        while len(self._descriptors) >= self._max_open_files:
            os.close(self._descriptors.popitem(last=False)[1])
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BadShard(f"{path} is missing: {_REMEDY}") from error
        try:
            self._check_local(path, descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptors[path] = descriptor
        return descriptor

    def _check_local(self, path: str, descriptor: int) -> None:
        facts = self._facts.get(path)
        if facts is None or path in self._verified:
            return
        _check_size(path, size=os.fstat(descriptor).st_size, facts=facts)
        if self._verify and facts.sha256:
            with open(descriptor, "rb", closefd=False) as stream:
                digest = stream_digest(stream)
            if digest != facts.sha256:
                raise BadShard(f"{path} does not match its digest in the manifest: {_REMEDY}")
        self._verified.add(path)

    def _check_remote_size(self, path: str) -> None:
        facts = self._facts.get(path)
        if facts is None or path in self._verified:
            return
        try:
            size = size_of(path)
        except FileNotFoundError as error:
            raise BadShard(f"{path} is missing: {_REMEDY}") from error
        if size is not None:
            _check_size(path, size=size, facts=facts)
        self._verified.add(path)


def _check_size(path: str, *, size: int, facts: ShardFacts) -> None:
    if size != facts.bytes:
        raise BadShard(f"{path} has {size} bytes, the manifest says {facts.bytes}: {_REMEDY}")


def _spans(parts: Sequence[ByteRange], *, wanted: Sequence[int], gap: int) -> Iterator[_Span]:
    """Ranges of one shard in the order of their offsets, merged if at most `gap` bytes are between them."""
    span = None
    for i in sorted(wanted, key=lambda i: parts[i].offset):
        start, end = parts[i].offset, parts[i].offset + parts[i].length
        if span is not None and start <= span.end + gap and end - span.start <= _SPAN_BYTES:
            span.parts.append(i)
            span = span._replace(end=max(span.end, end))
        else:
            if span is not None:
                yield span
            span = _Span(start, end, [i])
    if span is not None:
        yield span


def _distribute(answer: bytes | OSError, *, span: _Span, parts: Sequence[ByteRange], results: list[memoryview | OSError]) -> None:
    for i in span.parts:
        if isinstance(answer, OSError):
            results[i] = answer
        else:
            first = parts[i].offset - span.start
            results[i] = memoryview(answer)[first : first + parts[i].length]


def _pread(descriptor: int, *, start: int, end: int, path: str) -> bytes:
    pieces: list[bytes] = []
    at = start
    while at < end:
        piece = os.pread(descriptor, end - at, at)  # returns at most 2 GiB, or fewer bytes after a signal
        if not piece:
            raise BadShard(f"{path} ends before byte {end}, it is truncated: {_REMEDY}")
        pieces.append(piece)
        at += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
