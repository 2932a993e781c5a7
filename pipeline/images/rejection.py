"""Why an image cannot be used: the closed vocabulary, and the checks that need no decoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import one_line

REASONS: tuple[str, ...] = ("empty", "not-an-image", "truncated", "too-large")
MAX_DECODE_PIXELS = 180_000_000


class Rejection(ValueError):
    """An image that cannot be used: `reason` is one of `REASONS`, `detail` says more for people."""

    def __init__(self, reason: str, *, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_size(height: int, width: int, *, max_decode_pixels: int) -> None:
    if height * width > max_decode_pixels:
        raise Rejection("too-large", detail=f"{width}x{height} pixels, the limit is {max_decode_pixels / 1e6:g} megapixels")


@contextmanager
def damage_rejected() -> Iterator[None]:
    """Whatever a decoder raises once the header was fine: the file is cut off or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Rejection:
        raise
    except MemoryError as error:
        raise Rejection("too-large", detail="not enough memory to decode it") from error
    except Exception as error:
        raise Rejection("truncated", detail=one_line(error)) from error
