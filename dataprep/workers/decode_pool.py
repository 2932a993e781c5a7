"""Decode images of a finished corpus in worker processes. An image that crashes its decoder is rejected; the run continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from pipeline.images import Pixels, Rejection, load_image
from pipeline.size_rule import Crop
from pipeline.workers.pool import WorkerDied, WorkerPool
from pipeline.workers.process import Report

CRASHED = "crashed"
_TIMEOUT = 600.0  # seconds that one image may take


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """The bytes of an image file, the crops to decode, and whether two workers died at it."""

    data: bytes
    crops: Sequence[Crop]
    is_lost: bool = False


Decoded = list[Pixels] | str
"""(3, height, width) uint8 for each crop, or the reason why there are none."""

_EMPTY_REQUEST = DecodeRequest(b"", ())


class Decoders:
    """`workers` processes, started at first use. Use as a context manager, which ends them."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: WorkerPool | None = None

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
            return list(pool.map(decode_image, requests, retry=_after_crash))
        except Exception:
            self._end()
            raise

    def _start(self) -> WorkerPool:
        """Raises RuntimeError if a worker dies before it gets an image."""
        pool = WorkerPool(self._workers, timeout=_TIMEOUT, ahead=2)
        try:
            list(pool.map(decode_image, [_EMPTY_REQUEST] * self._workers))
        except RuntimeError as error:
            pool.close()
            raise RuntimeError(f"no processes can be started to decode images: {error}") from error
        return pool

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def decode_image(request: DecodeRequest, report: Report = lambda _: None) -> Decoded:
    """Decode one image; a task function of a pool."""
    if request.is_lost:
        return CRASHED
    report(0)
    try:
        found = [load_image(request.data, resize=crop[:2], crop=crop[2:]) for crop in request.crops]
        return [np.ascontiguousarray(pixels.transpose(2, 0, 1)) for pixels in found]
    except Rejection as rejection:
        return rejection.reason


def _after_crash(request: DecodeRequest, death: WorkerDied) -> DecodeRequest:
    return replace(request, is_lost=death.times > 1)
