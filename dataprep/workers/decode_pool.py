"""Decode images of a finished corpus in worker processes. An image that crashes its decoder is rejected; the run continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

import numpy as np

from pipeline.images import Pixels, Rejection, load_image
from pipeline.loading.worker_pool import WorkerPool
from pipeline.size_rule import Crop

CRASHED = "crashed"
_TIMEOUT = 600.0  # seconds that one image may take


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """The bytes of an image file, and the crops to decode."""

    data: bytes
    crops: Sequence[Crop]


Decoded = list[Pixels] | str
"""(3, height, width) uint8 for each crop, or the reason why there are none."""

_EMPTY_REQUEST = DecodeRequest(b"", ())


class Decoders:
    """`workers` processes, started at first use. Use as a context manager, which ends them."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: WorkerPool[DecodeRequest, Decoded] | None = None

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def decode(self, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Decode each image. An image at which two workers die is `crashed`."""
        if not requests:
            return []
        pool = self._pool = self._pool or self._start()
        try:
            return _map(pool, requests)
        except RuntimeError:
            self._end()
            raise

    def _start(self) -> WorkerPool[DecodeRequest, Decoded]:
        """Raises RuntimeError if a worker dies before it gets an image."""
        pool = WorkerPool(_identity, decode_image, workers=self._workers, timeout=_TIMEOUT)
        try:
            _map(pool, [_EMPTY_REQUEST] * self._workers)
        except RuntimeError as error:
            pool.close()
            raise RuntimeError(f"no processes can be started to decode images: {error}") from error
        return pool

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def decode_image(
    image: DecodeRequest, /, *, begin: Callable[[int], None] = lambda _: None, lost: Mapping[int, str] = MappingProxyType({})
) -> Decoded:
    """Decode in this process. An image is one part (see `pipeline.loading.worker_pool.Decode`)."""
    if lost:
        return CRASHED
    begin(0)
    try:
        found = [load_image(image.data, resize=crop[:2], crop=crop[2:]) for crop in image.crops]
        return [np.ascontiguousarray(pixels.transpose(2, 0, 1)) for pixels in found]
    except Rejection as rejection:
        return rejection.reason


def _map(pool: WorkerPool[DecodeRequest, Decoded], requests: Sequence[DecodeRequest]) -> list[Decoded]:
    for request in requests:
        pool.put(request)
    return [pool.get() for _ in requests]


def _identity(image: DecodeRequest) -> DecodeRequest:
    return image
