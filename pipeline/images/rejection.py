"""Reasons for rejecting an image, and the checks that need no decoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import one_line

REASONS: tuple[str, ...] = ("empty", "not-an-image", "damaged", "unsupported", "too-large")
MAX_DECODE_PIXELS = 180_000_000
# No real image of this size is stored in so few bytes, and decoding one costs seconds per byte. Smaller images are cheap anyway.
_BOMB_PIXELS, _BOMB_PIXELS_PER_BYTE = 4096 * 4096, 2000


class Rejection(ValueError):
    """An image that cannot be used. `reason` is one of `REASONS`, `detail` is for people."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def damaged(detail: str) -> Rejection:
    return Rejection("damaged", detail=detail)


def unsupported(detail: str) -> Rejection:
    """An intact image that no available decoder can read."""
    return Rejection("unsupported", detail=detail)


def check_size(height: int, width: int, *, max_decode_pixels: int) -> None:
    """Raise `Rejection` if the image has no pixels, or more than the limit."""
    if height <= 0 or width <= 0:
        raise damaged(f"its header says {width}x{height} pixels")
    if height * width > max_decode_pixels:
        raise Rejection("too-large", detail=f"{width}x{height} pixels, the limit is {max_decode_pixels / 1e6:g} megapixels")


def check_claim(height: int, width: int, *, length: int) -> None:
    """Raise `Rejection` if an image of this size cannot fit in `length` bytes."""
    if height * width > max(_BOMB_PIXELS, length * _BOMB_PIXELS_PER_BYTE):
        raise Rejection("too-large", detail=f"{length} bytes claim to be {width}x{height} pixels")


@contextmanager
def damage_rejected() -> Iterator[None]:
    """Turn any decoder exception after a valid header into a `Rejection`: the file is truncated or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Rejection:
        raise
    except MemoryError as error:
        raise Rejection("too-large", detail="not enough memory to decode it") from error
    except Exception as error:
        raise damaged(one_line(error)) from error
