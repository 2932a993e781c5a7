"""Signals that ask a training process to save and leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Signals:
    """The last signal that came, None before the first."""

    caught: int | None = None


@contextmanager
def listening() -> Iterator[Signals]:
    """Note SIGTERM, SIGINT and SIGHUP instead of dying of them: the loop saves and leaves. A second SIGINT interrupts at once.

    The loader's processes pay no heed: they end when it closes them, or with it.
    """
    signals, owner = Signals(), os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        if signals.caught == signal.SIGINT == number:
            raise KeyboardInterrupt
        signals.caught = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
