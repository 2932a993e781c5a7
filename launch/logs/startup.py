"""What a command does until its first result: imports, plan, weights, first step.

On a terminal one line that changes in place; elsewhere a line after one second, then every five. Importing this module is cheap: it works
while torch is being imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FIRST_LINE_SECONDS = 1.0
SECONDS_BETWEEN_LINES = 5.0
_REFRESH_SECONDS = 0.25


@dataclass(slots=True)
class Startup:
    """The start of this process. Nothing is shown outside `shown`."""

    _stage: str = ""
    _began: float = 0.0  # of the start
    _ended: threading.Event | None = None
    _thread: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def shown(self, stage: str) -> Iterator[None]:
        """Show the stages until `end`, the next `shown`, or the end of the context. Of all ranks, rank 0 shows them."""
        self.end()
        if os.environ.get("RANK", "0") != "0":
            yield
            return
        self._stage, self._began = stage, time.monotonic()
        self._ended = threading.Event()
        live = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._tick, args=(self._ended, live), name="startup", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self.end()

    def stage(self, text: str) -> None:
        """Name what is done now."""
        self._stage = text

    def end(self) -> None:
        """Show nothing more. May be called at any time."""
        if self._ended is None:
            return
        self._ended.set()
        assert self._thread is not None
        self._thread.join()
        self._ended = self._thread = None

    def line(self, text: str) -> None:
        """Print a line on standard error, above the live line if there is one."""
        with self._lock:
            print(f"\r\x1b[K{text}" if self._ended is not None and sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def _tick(self, ended: threading.Event, live: bool) -> None:
        if live:
            while True:
                self._show_live()
                if ended.wait(_REFRESH_SECONDS):
                    break
            with self._lock:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            return
        wait = FIRST_LINE_SECONDS
        while not ended.wait(wait):
            self.line(self._text())
            wait = SECONDS_BETWEEN_LINES

    def _show_live(self) -> None:
        """The cursor goes back to the start of the line, so that what others print replaces it."""
        width = shutil.get_terminal_size().columns
        with self._lock:
            print(f"\r\x1b[K{self._text()[: width - 1]}\r", end="", file=sys.stderr, flush=True)

    def _text(self) -> str:
        return f"starting: {self._stage}, {time.monotonic() - self._began:.0f} s"


STARTUP = Startup()
