"""Pictures of a finished corpus, decoded by processes of their own: what takes its decoder down is one rejection, not the run's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import numpy as np

from pipeline.images import Pixels, Rejection, load_image
from pipeline.resolution import Crop
from pipeline.workers import WorkerDied, WorkerPool

CRASHED = "crashed"
_TIMEOUT = 600.0  # seconds that one picture may take

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file's bytes, and the sizes at which it is wanted."""

    data: bytes
    crops: Sequence[Crop]


Decoded = list[Pixels] | str
"""(3, height, width) uint8 for each crop, or the reason why there are none."""

_NOTHING = Picture(b"", ())


class Decoders:
    """`workers` processes, which start when they are first needed. Use as a context manager: leaving it ends them."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: WorkerPool[Picture, Decoded] | None = None

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def decode(self, pictures: Sequence[Picture]) -> list[Decoded]:
        """Each of the pictures. One during which a worker dies gets another try, by itself; then it is `crashed`."""
        try:
            return self._decode(pictures)
        except WorkerDied:
            return [self._decode_alone(picture) for picture in pictures]

    def _decode_alone(self, picture: Picture) -> Decoded:
        try:
            return self._decode([picture])[0]
        except WorkerDied:
            return CRASHED

    def _decode(self, pictures: Sequence[Picture]) -> list[Decoded]:
        if not pictures:
            return []
        pool = self._pool = self._pool or self._start()
        try:
            return _map(pool, pictures)
        except RuntimeError:
            self._end()
            raise

    def _start(self) -> WorkerPool[Picture, Decoded]:
        """Raises RuntimeError where a worker dies without any picture."""
        pool = WorkerPool(_same, decode_picture, workers=self._workers, timeout=_TIMEOUT)
        try:
            _map(pool, [_NOTHING] * self._workers)
        except WorkerDied as error:
            pool.close()
            raise RuntimeError(f"no processes can be started to decode pictures: {error}") from error
        return pool

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def decode_picture(picture: Picture) -> Decoded:
    """In this process."""
    try:
        found = [load_image(picture.data, resize=crop[:2], crop=crop[2:]) for crop in picture.crops]
        return [np.ascontiguousarray(pixels.transpose(2, 0, 1)) for pixels in found]
    except Rejection as rejection:
        return rejection.reason


def _map(pool: WorkerPool[Picture, Decoded], pictures: Sequence[Picture]) -> list[Decoded]:
    for picture in pictures:
        pool.put(picture)
    return [pool.get() for _ in pictures]


def _same(value: Value) -> Value:
    return value
