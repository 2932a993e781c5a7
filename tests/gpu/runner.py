"""Run checks one after another in a worker process, and keep going whatever happens to one of them.

A check that raises, hangs or takes its process down is recorded; the rest goes on in a new process, because an error of CUDA spoils the
one it happens in. Results are written after every check, so that a run that is cut off leaves what it has measured.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Check(NamedTuple):
    """function: `module:name` of a function from a `Case` to a `Result`; seconds: its time limit."""

    name: str
    function: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of a check. It passes if each bounded figure is at most its bound and every expectation holds."""

    figures: Mapping[str, Any]
    bounds: Mapping[str, float] = field(default_factory=dict)
    expected: Mapping[str, bool] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """What is wrong, in words; empty if the check passes."""
        above = [f"{name} is {self.figures[name]:.3g}, more than {bound:g}" for name, bound in self.bounds.items() if self._exceeds(name)]
        return above + [f"not true: {name}" for name, holds in self.expected.items() if not holds]

    def _exceeds(self, name: str) -> bool:
        value = float(self.figures[name])
        return not math.isfinite(value) or value > self.bounds[name]


Body = Callable[[Connection, Sequence[Check]], None]  # of a worker: makes the case, then calls `serve`


def run(checks: Sequence[Check], body: Body, *, budget: float, report: Callable[[Row], None], start_seconds: float = 120.0) -> list[Row]:
    """Run all checks within `budget` seconds. `report` gets the row of each as soon as it has ended. start_seconds: limit until a worker
    is ready."""
    end = time.monotonic() + budget
    rows: list[Row] = []
    worker = _Worker(body, start_seconds=start_seconds)
    try:
        for index, check in enumerate(checks):
            rows.append({"name": check.name, **worker.run(checks[index:], end=end)})
            report(rows[-1])
    finally:
        worker.end()
    return rows


def work(pipe: Connection, checks: Sequence[Check], *, device: str, tiny: bool) -> None:
    """Body of a worker that runs checks of a device."""
    import torch

    from tests.gpu.case import Case

    case = Case(torch.device(device, 0) if device == "cuda" else torch.device(device), tiny)
    if case.on_gpu:
        torch.cuda.set_device(case.device)
    serve(pipe, checks, case, release=case.release)


def serve(pipe: Connection, checks: Sequence[Check], case: Any, *, release: Callable[[], None]) -> None:
    """Run checks in this process and send a row for each, until one raises. `release` frees what a check leaves."""
    for check in checks:
        pipe.send(None)
        start = time.monotonic()
        row = _row(check, case)
        pipe.send({**row, "seconds": round(time.monotonic() - start, 2)})
        if row["outcome"] == "crashed":
            return
        release()


def _row(check: Check, case: Any) -> Row:
    module, _, name = check.function.partition(":")
    try:
        result = getattr(import_module(module), name)(case)
        failures = result.failures()
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return {"outcome": "crashed", "error": message, "traceback": traceback.format_exc()[-2000:]}
    figures = {name: _short(value) for name, value in result.figures.items()}
    row = {"outcome": "failed" if failures else "passed", "figures": figures, "bounds": dict(result.bounds)}
    return {**row, "error": "; ".join(failures)} if failures else row


def _short(value: Any) -> Any:
    """Four digits of a number, and no infinity, which JSON does not have."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


class _Worker:
    """The current worker process, started when there is something to do."""

    def __init__(self, body: Body, *, start_seconds: float) -> None:
        self._body, self._start_seconds = body, start_seconds
        self._process: Any = None
        self._pipe: Any = None

    def run(self, checks: Sequence[Check], *, end: float) -> Row:
        """Row of the first of the checks that are left. end: when all time is over."""
        if time.monotonic() >= end:
            return {"outcome": "not run", "error": "no time was left"}
        if self._process is None:
            self._start(checks)
        start = time.monotonic()
        try:
            self._receive(min(self._start_seconds, end - start))  # it is ready
            start = time.monotonic()
            row = self._receive(min(checks[0].seconds, end - start))
        except TimeoutError as error:
            self.end()
            return {"outcome": "timed out", "error": str(error), "seconds": round(time.monotonic() - start, 2)}
        except (EOFError, ConnectionResetError):
            code = self._exit_code()
            self.end()
            died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return {"outcome": "crashed", "error": f"its process ended with {died}", "seconds": round(time.monotonic() - start, 2)}
        if row["outcome"] == "crashed":
            self.end()
        return row

    def _start(self, checks: Sequence[Check]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_in_own_session, args=(self._body, other, list(checks)))
        self._process.start()
        other.close()

    def _exit_code(self) -> int:
        self._process.join()
        return self._process.exitcode

    def _receive(self, seconds: float) -> Any:
        if not self._pipe.poll(max(0.0, seconds)):
            raise TimeoutError(f"no result in {seconds:.0f} seconds")
        return self._pipe.recv()

    def end(self) -> None:
        """Kill the worker with the processes that it has started."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no session of its own yet, or is gone
            self._process.kill()
        self._process.join()
        self._process = self._pipe = None


def _in_own_session(body: Body, pipe: Connection, checks: Sequence[Check]) -> None:
    """Run a worker's body so that its own processes can be killed with it, and what libraries print does not mix with the JSON."""
    os.setsid()
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    body(pipe, checks)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def write(path: Path | None, summary: Row) -> None:
    """Write the summary whole or not at all."""
    if path is not None:
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def show(row: Row) -> None:
    """A readable part of the table, on standard error."""
    seconds = f"{row['seconds']:.1f} s" if "seconds" in row else ""
    print(f"{row['outcome'].upper():>9}  {row['name']:<22} {seconds:>8}  {row.get('error', '')}", file=sys.stderr, flush=True)
    for name, value in row.get("figures", {}).items():
        bound = f"   (at most {row['bounds'][name]:g})" if name in row["bounds"] else ""
        print(f"{'':>11}{name:<52} {value}{bound}", file=sys.stderr, flush=True)
