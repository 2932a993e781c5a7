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

    def column(self, section: str) -> dict[str, float]:
        """The column of a section, which starts again from zero."""
        seconds, self.seconds[section] = self.seconds[section], 0.0
        return {f"seconds_{section}": seconds}

    def columns(self) -> dict[str, float]:
        """Columns of a row; all sections start again from zero."""
        return {name: seconds for section in SECTIONS for name, seconds in self.column(section).items()}
