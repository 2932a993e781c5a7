"""Output of commands: results on standard output, progress and remarks on standard error, errors in one line.

Every command runs inside `session`, the only place that converts exceptions to exit codes:

    0 success · 1 failure (OSError, RuntimeError, unexpected errors) · 2 invalid usage, config or input (ValueError) · 130 interrupted

`SystemExit` is passed through: the trainer exits with 75 after a signal, when it has saved a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, TextIO

from launch.logs.startup import STARTUP
from pipeline.errors import DetailedError, kind_and_line, one_line
from pipeline.progress import Progress

STOPPED, INTERRUPTED = 75, 130  # see above
LONGEST_ERROR = 800
SECONDS_BETWEEN_LINES = 5.0


class Console:
    """Output of one command. In JSON mode, standard output contains only the result, one object."""

    def __init__(self, *, out: TextIO, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json

    def line(self, text: str) -> None:
        """Print a line to standard error."""
        STARTUP.line(text)

    def result(self, text: str, *, data: Mapping[str, Any]) -> None:
        """Print the command's result: `text`, or in JSON mode `data` as one line. Ends the display of the start."""
        STARTUP.end()
        output = json.dumps(_plain(data), ensure_ascii=False) if self._as_json else text
        try:
            print(output, file=self._out, flush=True)
        except BrokenPipeError:  # e.g. `tim … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def failure(self, message: str, *, code: int, data: Mapping[str, Any] | None = None) -> None:
        """Print an error line to standard error; in JSON mode also an object with the message and `data`."""
        self.line(f"error: {message}")
        if self._as_json:
            self.result("", data={"error": message, "exit": code, **(data or {})})

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield a progress callback: live bars on a terminal, occasional plain lines otherwise. Ends the display of the start."""
        STARTUP.end()
        if not sys.stderr.isatty():
            lines = _PlainLines(self.line)
            yield lines.report
            lines.finish()
            return
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        texts = (TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[note]}"))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), *texts)
        with Bars(*columns, console=Terminal(stderr=True), redirect_stdout=not self._as_json) as bars:
            stages: dict[str, Any] = {}

            def report(stage: str, done: int, total: int | None, *, note: str = "") -> None:
                if stage not in stages:
                    stages[stage] = bars.add_task(stage, total=total, note="", rate="")
                bar = bars.tasks[stages[stage]]
                bars.update(stages[stage], completed=done, total=total, note=note, rate=f"{bar.speed:,.0f}/s" if bar.speed else "")

            yield report
            for bar in bars.tasks:
                if bar.total is None:  # its end was not known before: "40/40" instead of "40/?"
                    bars.update(bar.id, total=bar.completed)


@contextmanager
def session(*, as_json: bool, debug: bool) -> Iterator[Console]:
    """Run a command with a `Console`. If it raises, print one line and exit with the matching code."""
    with _only_json_on_stdout() if as_json else nullcontext(sys.stdout) as out:
        console = Console(out=out, as_json=as_json)
        data: Mapping[str, Any] = {}
        try:
            yield console
        except KeyboardInterrupt:
            code, message = INTERRUPTED, "interrupted"
        except Exception as error:
            if debug:
                traceback.print_exc()
            code, message = explain(error)
            if isinstance(error, DetailedError):
                data = error.data
                for line in error.lines:
                    console.line(line)
        else:
            return
        console.failure(message, code=code, data=data)
        raise SystemExit(code)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and one-line message of an error."""
    text = one_line(error, limit=LONGEST_ERROR)
    if isinstance(error, ValueError):
        return 2, text
    if isinstance(error, OSError) and error.strerror and error.filename:
        return 1, f"{error.strerror}: {error.filename}"
    if isinstance(error, (OSError, RuntimeError)) and str(error):
        return 1, text
    return 1, f"{kind_and_line(error, limit=LONGEST_ERROR)} (unexpected error: run the command again with --debug for the traceback)"


class _PlainLines:
    """Progress as plain lines: one every few seconds, and one with the final count of each stage."""

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line = line
        self._stage = ""
        self._newest = self._printed = ""
        self._when = time.monotonic()
        self._first = (self._when, 0)  # time and count at the start of the stage

    def report(self, stage: str, done: int, total: int | None, *, note: str = "") -> None:
        if stage != self._stage:
            self.finish()
            self._stage = stage
            self._first = (time.monotonic(), done)
        self._newest = f"{stage} {done}" if total is None else f"{stage} {done}/{total}"
        self._newest += "".join(f", {part}" for part in (*self._pace(done, total=total), note) if part)
        if time.monotonic() - self._when >= SECONDS_BETWEEN_LINES:
            self.finish()

    def _pace(self, done: int, *, total: int | None) -> tuple[str, ...]:
        """Rate and remaining time, once there is enough data."""
        start, done_before = self._first
        seconds, new = time.monotonic() - start, done - done_before
        if seconds < SECONDS_BETWEEN_LINES or new <= 0:
            return ()
        rate = f"{new / seconds:,.1f}/s"
        return (rate,) if total is None or total <= done else (rate, f"{_duration((total - done) * seconds / new)} to go")

    def finish(self) -> None:
        """Print the latest report, unless it has been printed."""
        if self._newest != self._printed:
            self._line(self._newest)
        self._printed = self._newest
        self._when = time.monotonic()


def _duration(seconds: float) -> str:
    """`_duration(75)` → "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def _only_json_on_stdout() -> Iterator[TextIO]:
    """Redirect standard output of libraries and child processes to standard error; yields the real standard output."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):
        descriptor = -1
    if descriptor != 1:  # replaced in this process, e.g. by a test: child processes do not write to it
        real = sys.stdout
        with redirect_stdout(sys.stderr):
            yield real
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(saved, "w", closefd=False) as real, redirect_stdout(sys.stderr):
            yield real
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _plain(value: Any) -> Any:
    """Convert to JSON types: infinities and NaN become null, paths and other objects strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)
