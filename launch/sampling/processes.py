"""Processes that share the work of a command: started by it, by torchrun or by accelerate."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.console import INTERRUPTED, Console, explain
from pipeline.storage.atomic import publish_text

if TYPE_CHECKING:
    from accelerate import PartialState

RESULT = "TIM_RESULT"  # file for the result of several processes
_ERROR = "error"  # first word of the files beside it
PATIENCE = timedelta(days=7)  # that a process waits for the others


@contextmanager
def team() -> Iterator[PartialState | None]:
    """The processes that share the work; None if there is only this one.

    Their errors are left for the process that started them, which prints the first one: all may fail for the same reason, or because one
    has. With --debug, and under accelerate, each prints its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    try:
        yield state
    except (Exception, KeyboardInterrupt) as error:
        if RESULT not in os.environ or "--debug" in sys.argv:
            raise
        code, message = explain(error) if isinstance(error, Exception) else (INTERRUPTED, "interrupted")
        file = Path(os.environ[RESULT]).with_name(f"{_ERROR}-{state.process_index}.json")
        publish_text(file, json.dumps({"code": code, "message": message}))
        raise SystemExit(code) from error
    state.destroy_process_group()


def of_all(value: int, state: PartialState | None) -> list[int]:
    """The value of each process. Waits for all of them."""
    if state is None:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def result_of_processes(command: str, arguments: Sequence[str], *, processes: int, console: Console) -> dict[str, Any]:
    """Run `tim COMMAND ARGUMENTS…` in several processes, and return what the main one gives to `deliver`.

    Raises SystemExit, after an error line, with the exit code of a process that failed.
    """
    from launch.distributed.torchrun import run_in_processes  # the supervisor of processes takes long to import

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        os.environ[RESULT] = str(file)
        code = run_in_processes([command, *arguments], processes=processes)
        if code:
            code = _report_failure(command, Path(folder), code=code, console=console)
            raise SystemExit(code)
        return json.loads(file.read_text(encoding="utf-8"))


def _report_failure(command: str, folder: Path, *, code: int, console: Console) -> int:
    """Print the first error of the processes. Returns the exit code."""
    errors = sorted(folder.glob(f"{_ERROR}-*.json"), key=lambda file: file.stat().st_mtime_ns)
    if not errors:
        console.failure(f"tim {command} ended with exit code {code}: see the lines above; the same command goes on", code=code)
        return code
    first = json.loads(errors[0].read_text(encoding="utf-8"))
    console.failure(first["message"], code=first["code"])
    return first["code"]


def deliver(result: Mapping[str, Any]) -> bool:
    """Leave the result, plain JSON, for the process that started this one. Returns False if there is none."""
    if RESULT not in os.environ:
        return False
    publish_text(Path(os.environ[RESULT]), json.dumps(result))
    return True
