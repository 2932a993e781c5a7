"""Signal handling: save and exit on SIGTERM, SIGINT and SIGHUP."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Signals:
    """The last received signal; None before the first."""

    caught: int | None = None


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """Record SIGTERM, SIGINT and SIGHUP instead of exiting, so that the loop can save first. A second SIGINT interrupts at once.

    Loader processes, which inherit the handlers, ignore the signals: the loader ends them.
    """
    signals, pid = Signals(), os.getpid()

    def record(number: int, frame: FrameType | None) -> None:
        if os.getpid() != pid:
            return
        if signals.caught == signal.SIGINT == number:
            raise KeyboardInterrupt
        signals.caught = number

    previous = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
