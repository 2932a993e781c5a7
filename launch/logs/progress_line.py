"""Progress of a training on standard error: live on a terminal, plain lines otherwise; always also in the log of the rank."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from launch.logs.rank_log import RANK_LOG
from launch.logs.startup import STARTUP

SECONDS_BETWEEN_LINES = 10.0
_FIRST_STEP = "first step: loading data, warming up"


class ProgressLine:
    """Progress of a run. `done`: steps already done when the run was resumed; `quiet`: only in the log of the rank."""

    def __init__(self, *, steps: int, done: int, quiet: bool) -> None:
        self._steps = steps
        self._last = -math.inf
        self._quiet = quiet
        self._started = time.monotonic()
        self._first = done
        self._validation = ""  # the last one, in words
        self._live = None
        STARTUP.stage("first step")
        if not quiet and sys.stderr.isatty():
            self._start_live(done)

    def _start_live(self, done: int) -> None:
        """Two lines, so that both are whole on 80 columns: the bar with the time that is left, and the figures."""
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.text import Text

        STARTUP.end()
        console = Console(stderr=True)
        times = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))
        self._bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), *times, console=console)
        self._task = self._bar.add_task("", total=self._steps, completed=done)
        self._figures = Text(_FIRST_STEP)
        self._live = Live(Group(self._bar, self._figures), console=console, refresh_per_second=4)
        self._live.start()

    def log(self, text: str) -> None:
        """Print a line above the progress line. May be called from any thread."""
        RANK_LOG.line(text)
        if self._quiet:
            return
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            STARTUP.line(text)

    def show(self, step: int, row: dict[str, Any] | None) -> None:
        """Advance to a step, and update the figures if there is a new row."""
        STARTUP.end()
        figures = None
        if row:
            speed = f"{row['images_per_second']:.1f} images/s · {row['tokens_per_second']:,.0f} tokens/s"
            self._validation = validation_in_words(row) or self._validation
            figures = " · ".join(filter(None, [f"loss {_in_words(row['loss'])}", self._validation, speed, f"fill {row['fill']:.1%}"]))
        if self._live:
            self._bar.update(self._task, completed=step)
            self._figures.plain = figures or ("" if self._figures.plain == _FIRST_STEP else self._figures.plain)
        if step == self._first + 1 and step < self._steps and not figures:
            self._print(f"step {step}/{self._steps} · the first one took {time.monotonic() - self._started:.1f} s")
        if figures and (time.monotonic() - self._last >= SECONDS_BETWEEN_LINES or step == self._steps):
            self._last = time.monotonic()
            per_step = (self._last - self._started) / max(1, step - self._first)
            left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self._steps - step)))
            self._print(f"step {step}/{self._steps} · {figures} · {left} left")

    def _print(self, text: str) -> None:
        """A plain line, for which a terminal has its live lines."""
        RANK_LOG.line(text)
        if not self._quiet and not self._live:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        STARTUP.end()
        if self._live:
            self._live.stop()


def validation_in_words(row: Mapping[str, Any]) -> str:
    """The validation loss of a row, for a progress line; "" without one."""
    if "validation_loss" not in row:
        return ""
    if not row["validation_images"]:
        return "validation without images"
    return f"validation {_in_words(row['validation_loss'])} (EMA {_in_words(row['validation_loss_ema'])})"


def _in_words(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
