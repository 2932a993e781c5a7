"""Evaluate checkpoints with `tim eval`, in a process of its own while training goes on. On rank 0.

    RUN/evaluations/step-000500/
      row.json     what the step's row of the metrics begins with
      model/       the exported weights, until the evaluation ends
      log.txt      output of the process
      eval.json …  what `tim eval` writes, when it is finished

One evaluation runs at a time. A newer checkpoint that is due replaces one that waits. A killed run repeats what was not finished.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from launch.checkpoints.checkpoint import read_trainer_state, step_folders, step_of
from launch.checkpoints.evaluation_results import EVALUATIONS, RESULT, STEP, columns, evaluation_folder, read_results
from launch.config.run_sections import EvalConfig
from launch.distributed.heartbeat import LAUNCHER
from pipeline.errors import kind_and_line
from pipeline.storage.atomic import publish_text

ROW, MODEL, LOG = "row.json", "model", "log.txt"
CLOSING_SECONDS = 10.0  # for a process that is killed to end
# Variables by which libraries take the process for a rank of the training.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "ROLE_", "GROUP_", "SLURM_", "OMPI_", "PMI_", LAUNCHER)


class Evaluations:
    """Background evaluations of a run's checkpoints. `add` and `uses` may be called from any thread."""

    def __init__(self, run_dir: Path, section: EvalConfig, *, corpus: str, device: str, steps: int, log: Callable[[str], None]) -> None:
        """corpus: of the real images; device: to draw on; steps: of the whole run, whose last one is evaluated, too."""
        self._run_dir, self._section, self._steps, self._log = run_dir, section, steps, log
        self._corpus, self._device = corpus, device
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._running: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._rows: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def resume(self, step: int, *, logged: Collection[int]) -> None:
        """Go on after an earlier process. step: where the run resumes; logged: steps whose evaluations the metrics have.

        Removes evaluations of later steps, takes up finished ones, and repeats that of the newest checkpoint if it was not finished. Logs
        which others were not finished.
        """
        lost = []
        for folder in sorted((self._run_dir / EVALUATIONS).glob("step-*")):
            number = folder.name.removeprefix("step-")
            if not number.isdecimal():  # a copy that somebody made
                continue
            if int(number) > step:
                shutil.rmtree(folder, ignore_errors=True)
            elif not (folder / RESULT).is_file():
                lost.append(int(number))
            elif int(number) not in logged:
                self._finish(folder)
        due = [folder for folder in step_folders(self._run_dir) if self._is_due(step_of(folder)) and step_of(folder) <= step]
        lost += [number for each in due if not self._folder(number := step_of(each)).exists()]
        newest = step_of(due[-1]) if due else None
        if newest in lost:
            self.add(due[-1])
        others = sorted(set(lost) - {newest})
        if others:
            steps = f"step{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
            self._messages.put(f"{steps}: not evaluated, the run ended before; only the newest checkpoint's evaluation is repeated")

    def add(self, folder: Path) -> None:
        """Evaluate a published checkpoint, if it is due: now, or after the one in progress."""
        if not self._is_due(step_of(folder)):
            return
        with self._changed:
            if self._waiting is not None:
                self._messages.put(
                    f"{self._waiting.name} is not evaluated: {folder.name} is newer, and evaluations take longer than training"
                )
            self._waiting = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="evaluations", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def uses(self, folder: Path) -> bool:
        """Whether a checkpoint is still needed: it waits, or is not exported yet."""
        with self._changed:
            is_read = folder == self._running and not (self._folder(step_of(folder)) / MODEL).is_dir()
            return folder == self._waiting or is_read

    def finished(self) -> list[dict[str, Any]]:
        """Rows for the metrics since the last call, with the step that each belongs to. Logs what has happened."""
        for _ in range(self._messages.qsize()):
            self._log(self._messages.get_nowait())
        return [self._rows.get_nowait() for _ in range(self._rows.qsize())]

    @property
    def in_progress(self) -> str | None:
        """In words, None if nothing is to be done."""
        with self._changed:
            folder = self._waiting or self._running
            return None if folder is None else f"evaluation of {folder.name} (log: {self._log_file(folder)})"

    def wait(self, seconds: float) -> bool:
        """Wait until everything is evaluated. Returns False if it is not after `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._running is None, seconds)

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Kill the evaluation in progress: a resumed run repeats it."""
        with self._changed:
            self._is_closed, self._waiting = True, None
            self._changed.notify_all()
            if self._process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        if self._thread is not None:
            self._thread.join(CLOSING_SECONDS)

    def _is_due(self, step: int) -> bool:
        return step % self._section.every == 0 or step == self._steps

    # In the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closed)
                if self._is_closed:
                    return
                self._running, self._waiting = self._waiting, None
            assert self._running is not None
            try:
                self._evaluate(self._running)
            except Exception as error:  # an evaluation never ends a run
                self._messages.put(f"warning: {self._running.name} was not evaluated: {kind_and_line(error)}")

    def _evaluate(self, checkpoint: Path) -> None:
        step, started = step_of(checkpoint), time.monotonic()
        folder = self._folder(step)
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run, maybe with other settings
        folder.mkdir(parents=True)
        publish_text(folder / ROW, json.dumps({"step": step, **_position(read_trainer_state(checkpoint))}) + "\n")
        command = [sys.executable, "-m", "launch.evaluating.process", str(os.getpid()), str(self._run_dir), str(step), str(folder / MODEL)]
        with open(folder / LOG, "wb") as log:
            with self._changed:
                if self._is_closed:
                    return
                self._process = subprocess.Popen(
                    [*command, *self._options(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    start_new_session=True,
                )
            code = self._process.wait()
        with self._changed:
            self._process = None
            if self._is_closed:
                return
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        if code or not read_results(folder):
            self._messages.put(f"warning: the evaluation of step {step} failed ({_last_line(folder / LOG)}): see {folder / LOG}")
            return
        self._messages.put(f"evaluated step {step} in {time.monotonic() - started:.0f} s: {folder / RESULT}")
        self._finish(folder)

    def _finish(self, folder: Path) -> None:
        """Hand on the row of a finished evaluation."""
        try:
            row = json.loads((folder / ROW).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        found = columns(read_results(folder))
        if found:
            self._rows.put({**row, STEP: row["step"], **found})

    def _options(self, folder: Path) -> list[str]:
        section = self._section
        options = ["--corpus", self._corpus, "--steps", ",".join(map(str, section.steps)), "--images", str(section.images)]
        for features in section.features:
            options += ["--features", features]
        options += ["--metrics", ",".join(section.metrics)] if section.metrics else []
        options += ["--clip", section.clip] if section.clip else []
        return [*options, "--device", self._device, "--processes", "1", "--out", str(folder), "--json"]

    def _folder(self, step: int) -> Path:
        return evaluation_folder(self._run_dir, step)

    def _log_file(self, checkpoint: Path) -> Path:
        return self._folder(step_of(checkpoint)) / LOG


def _position(state: Mapping[str, Any]) -> dict[str, Any]:
    """Images, seconds and restarts at a checkpoint, the other axes of a plot."""
    meter = state["meter"]
    return {"images": meter["total"]["images"], "seconds": meter["seconds"], "restarts": meter.get("restarts", 0)}


def _environment() -> dict[str, str]:
    """The environment of this process, without what makes libraries join the training."""
    return {name: value for name, value in os.environ.items() if name not in _OF_RANKS and not name.startswith(_OF_LAUNCHERS)}


def _last_line(path: Path) -> str:
    """The last error in a log, or its last line."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1][:200]
