"""How work tells how far it is, to whoever wants to show it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the name of the stage, how many are done, how many there are (None: unknown), and a remark."""

    def __call__(self, stage: str, done: int, total: int | None, /, *, note: str = "") -> None: ...


def no_progress(stage: str, done: int, total: int | None, /, *, note: str = "") -> None:
    """Progress that nobody wants to see."""
