"""What a command says: its result on standard output, progress and remarks on standard error, errors in one line.

Every command runs inside `session`, which is the only place that turns an exception into an exit code:

    0 fine · 1 failed (OSError, RuntimeError, anything unforeseen) · 2 wrong usage, config or input (ValueError) · 130 interrupted

A `SystemExit` passes through untouched: the trainer leaves with 75 after it was stopped by a signal and has saved.
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

from pipeline.errors import DetailedError, kind_and_line, one_line
from pipeline.progress import Progress

STOPPED = 75  # see above
LONGEST_ERROR = 800
SECONDS_BETWEEN_LINES = 5.0


class Console:
    """The output of one command. In JSON mode the result is one object on standard output, and nothing else goes there."""

    def __init__(self, *, out: TextIO, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json

    def line(self, text: str) -> None:
        """A remark for the person at the terminal, or for the log: standard error."""
        print(text, file=sys.stderr, flush=True)

    def result(self, text: str, *, data: Mapping[str, Any]) -> None:
        """The command's outcome: `text` for people, or `data` as one line of JSON."""
        written = json.dumps(_plain(data), ensure_ascii=False) if self._as_json else text
        try:
            print(written, file=self._out, flush=True)
        except BrokenPipeError:  # `tim … | head`: the reader has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def failure(self, message: str, *, code: int, data: Mapping[str, Any] | None = None) -> None:
        """One line on standard error; in JSON mode the object says the same, and `data`."""
        self.line(f"error: {message}")
        if self._as_json:
            self.result("", data={"error": message, "exit": code, **(data or {})})

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield the function to report progress to: a live bar on a terminal, a plain line now and then in a log."""
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


@contextmanager
def session(*, as_json: bool, debug: bool) -> Iterator[Console]:
    """Run a command: yields its `Console`, and ends the process with one line and an exit code where the command raises."""
    with _only_json_on_stdout() if as_json else nullcontext(sys.stdout) as out:
        console = Console(out=out, as_json=as_json)
        data: Mapping[str, Any] = {}
        try:
            yield console
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
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
    """Exit code and one line for people."""
    text = one_line(error, limit=LONGEST_ERROR)
    if isinstance(error, ValueError):
        return 2, text
    if isinstance(error, OSError) and error.strerror and error.filename:
        return 1, f"{error.strerror}: {error.filename}"
    if isinstance(error, (OSError, RuntimeError)) and str(error):
        return 1, text
    return 1, f"{kind_and_line(error, limit=LONGEST_ERROR)} (unforeseen: run the command again with --debug for the traceback)"


class _PlainLines:
    """Progress for a log: a line every few seconds, and one with the final count of each stage."""

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line = line
        self._stage = ""
        self._newest = self._said = ""
        self._when = time.monotonic()
        self._first = (self._when, 0)  # when the stage began, and what was done by then

    def report(self, stage: str, done: int, total: int | None, *, note: str = "") -> None:
        if stage != self._stage:
            self.finish()
            self._stage = stage
            self._first = (time.monotonic(), done)
        self._newest = f"{stage} {done}" if total is None else f"{stage} {done}/{total}"
        self._newest += "".join(f", {words}" for words in (*self._pace(done, total=total), note) if words)
        if time.monotonic() - self._when >= SECONDS_BETWEEN_LINES:
            self.finish()

    def _pace(self, done: int, *, total: int | None) -> tuple[str, ...]:
        """Rate and time to go, once there is something to tell them by."""
        began, before = self._first
        seconds, fresh = time.monotonic() - began, done - before
        if seconds < SECONDS_BETWEEN_LINES or fresh <= 0:
            return ()
        rate = f"{fresh / seconds:,.1f}/s"
        return (rate,) if total is None or total <= done else (rate, f"{_duration((total - done) * seconds / fresh)} to go")

    def finish(self) -> None:
        """Say what was reported last, unless that has been said."""
        if self._newest != self._said:
            self._line(self._newest)
        self._said = self._newest
        self._when = time.monotonic()


def _duration(seconds: float) -> str:
    """`_duration(75)` → "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def _only_json_on_stdout() -> Iterator[TextIO]:
    """Send to standard error what libraries, compilers and child processes print to standard output; yields the real one."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError):
        descriptor = -1
    if descriptor != 1:  # replaced in this process, e.g. by a test: nobody else can reach it
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
    """`value` as JSON can hold it: infinities and NaN become null, paths and other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return str(value)
