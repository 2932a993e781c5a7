"""Seconds of a training by section."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SECTIONS = ("data", "compute", "optimizer", "save", "validation")


class SectionClock:
    """Seconds by section since the last row of the metrics, on the host's clock.

    A GPU works behind the host, which waits for it at the end of `compute` (the losses) and of `optimizer` (the gradient's norm).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(SECTIONS, 0.0)

    @contextmanager
    def measure(self, section: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[section] += time.monotonic() - start

    def columns(self) -> dict[str, float]:
        """Columns of a row; the clock starts again from zero."""
        columns = {f"seconds_{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        return columns
