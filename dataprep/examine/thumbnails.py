"""Thumbnails for the report: of rejected inputs, which are not stored, and of example images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from dataprep.workers.pool import Pool
from pipeline.images import Pixels, Rejection, read_image
from pipeline.storage.shard_reader import ShardReader

LARGEST_SIDE = 160  # pixels
_QUALITY = 75


@dataclass(frozen=True, slots=True)
class ThumbnailTask:
    """An image in a tar at a path or URL. `skip`: it crashed its process."""

    tar: str
    offset: int
    length: int
    skip: bool = False


def thumbnail(pixels: Pixels) -> bytes:
    """(H, W, 3) uint8 → a JPEG of at most 160 × 160 pixels. Images are not enlarged."""
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def thumbnails(locations: Sequence[tuple[str, int, int]], *, pool: Pool) -> list[bytes]:
    """Thumbnails of the images at (tar, offset, length); b"" for an unreadable image."""
    return list(
        pool.map(make_thumbnail, [ThumbnailTask(*location) for location in locations], retry=lambda task, death: replace(task, skip=True))
    )


def make_thumbnail(task: ThumbnailTask, report: Callable[[int], None]) -> bytes:
    if task.skip:
        return b""
    reader = ShardReader()
    try:
        return thumbnail(read_image(reader.read(task.tar, offset=task.offset, length=task.length)).pixels)
    except (OSError, Rejection):
        return b""
    finally:
        reader.close()
