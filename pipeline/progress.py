"""Progress reporting."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the name of the stage, the number done, the total (None: unknown) and a note."""

    def __call__(self, stage: str, done: int, total: int | None, /, *, note: str = "") -> None: ...


def no_progress(stage: str, done: int, total: int | None, /, *, note: str = "") -> None:
    """Ignore progress."""
