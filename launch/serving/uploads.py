"""Uploaded files, decoded in a process of their own: a file that crashes or stalls its decoder costs that process, not the server."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from launch.sampling.editing import image_of_bytes, mask_of_bytes
from launch.sampling.files.image_files import Recorded, recorded_in
from launch.serving.limits import Busy, Limits
from pipeline.workers.pool import WorkerDied, WorkerPool, WorkerStuck
from pipeline.workers.process import Report

_SECONDS = 30.0  # that one file may take
_MEMORY = 3_000_000_000  # bytes of the process, many times the pixels of the largest image
_WAITING, _OF_A_CLIENT = 16, 2  # requests whose files are read or wait for it, of all clients and of one

Kind = Literal["image", "mask", "recorded"]


@dataclass(frozen=True, slots=True)
class Upload:
    """The bytes of a file, what is wanted of it, its name in messages, and whether a process died at it: a client may send it again."""

    data: bytes
    kind: Kind
    named: str
    max_pixels: int
    is_lost: bool = False


class Uploads:
    """Reads uploaded files within the limits. Safe for several threads, which take turns. `close` ends its process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()  # by client
        self._places = threading.Lock()
        self._pool = WorkerPool(1, name="decoder", memory=_MEMORY, timeout=_SECONDS, preload=[__name__])  # it imports torch

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place among those whose files are read. Raises Busy if there is none, so that slow files do not take all threads."""
        with self._places:
            if self._waiting.total() >= _WAITING or self._waiting[client] >= _OF_A_CLIENT:
                raise Busy("the server reads other uploads; try again", seconds=2)
            self._waiting[client] += 1
        try:
            yield
        finally:
            with self._places:
                self._waiting[client] -= 1
                self._waiting += Counter()  # forgets clients without one

    def image(self, data: bytes, *, named: str) -> Image.Image:
        """The RGB image of a file. Raises ValueError in a sentence, here and below."""
        image = self._read(data, "image", named)
        self._check_side(image, named)
        return image

    def mask(self, data: bytes, *, named: str) -> Image.Image:
        """The L mask of a file."""
        mask = self._read(data, "mask", named)
        self._check_side(mask, named)
        return mask

    def recorded(self, data: bytes, *, named: str) -> Recorded:
        """What an image file records."""
        return self._read(data, "recorded", named)

    def close(self) -> None:
        """End the process."""
        self._pool.close()

    def _read(self, data: bytes, kind: Kind, named: str) -> Any:
        if len(data) > self._limits.max_upload:
            raise ValueError(f"{named}: has {len(data):,} bytes, the limit is {self._limits.max_upload_mb} MB")
        task = Upload(data, kind, named, self._limits.max_pixels)
        with self._lock:
            try:
                return self._pool.get(self._pool.put(read_upload, task, retry=_after_death))
            except WorkerStuck as error:
                raise ValueError(f"{named}: could not be read, because the server is too busy to start its decoder; try again") from error

    def _check_side(self, image: Image.Image, named: str) -> None:
        if max(image.size) > self._limits.max_side:
            raise ValueError(f"{named}: has {image.width}x{image.height} pixels, the limit is {self._limits.max_side} a side")


def read_upload(task: Upload, report: Report) -> Image.Image | Recorded:
    """Decode one file; a task function of a pool. Raises ValueError."""
    if task.is_lost:
        raise ValueError(f"{task.named}: its decoder failed or took longer than {_SECONDS:g} s; give another file")
    report(0)
    if task.kind == "recorded":
        return recorded_in(io.BytesIO(task.data), named=task.named)
    decode = image_of_bytes if task.kind == "image" else mask_of_bytes
    return decode(task.data, named=task.named, max_pixels=task.max_pixels)


def _after_death(task: Upload, death: WorkerDied) -> Upload:
    return replace(task, is_lost=True)
