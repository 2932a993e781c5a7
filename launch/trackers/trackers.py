"""Send the metrics and previews of a run to its trackers, from a thread of rank 0.

    RUN/trackers.json    {"format": 1, "wandb": {"id": "…", "logged": 480, "shown": 400}, …}

A resumed run goes on under the stored ids. `logged` is the last step that a tracker may have of earlier processes: steps that are taken
again after a crash are not sent again, so the steps of a tracker only grow. `shown` is the step of the last preview that it has, which may
be behind. RUN/metrics.jsonl has every row, and a tracker that fails is turned off without harm.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from launch.checkpoints.evaluation_results import STEP as EVALUATED
from launch.config.run_sections import TrackerKind
from launch.config.schema import Config, to_yaml
from launch.trackers.backends import Backend, make_backend
from pipeline.errors import kind_and_line
from pipeline.storage.atomic import publish_text

FILE = "trackers.json"
WAITING = 1000  # rows and images that may wait for a slow tracker
CLOSING_SECONDS = 60.0  # in all: a Slurm job has two minutes for its last step, the save and this


class Trackers:
    """The trackers of a run. `write` and `show` return at once."""

    def __init__(self, config: Config, *, step: int, ahead: int, log: Callable[[str], None]) -> None:
        """step: where the run goes on; ahead: the last step that an earlier process has logged; log: prints a line."""
        assert config.run_dir is not None
        self._config, self._run_dir, self._log = config, config.run_dir, log
        self._kinds, self._step = config.log.trackers, step
        self._state = _read_state(config.run_dir / FILE)
        for kind in self._kinds:
            known = kind in self._state
            entry = self._state.setdefault(kind, {"id": None, "logged": 0, "shown": 0})
            entry["logged"] = max(entry["logged"], ahead) if known else 0
        self._backends: dict[TrackerKind, Backend] = {}
        self._queue: queue.Queue[Callable[[Backend, dict[str, Any]], None] | None] = queue.Queue(maxsize=WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="trackers", daemon=True)

    def __enter__(self) -> Trackers:
        if self._kinds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait until all is sent, but not for ever."""
        if not self._kinds:
            return
        deadline = time.monotonic() + CLOSING_SECONDS
        try:
            self._queue.put(None, timeout=CLOSING_SECONDS)
        except queue.Full:
            self._dropped += 1
        self._thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if self._dropped or self._thread.is_alive():
            names = ", ".join(self._backends)
            self._log(f"warning: log.trackers: {names} too slow: not all was sent; metrics.jsonl has every row")

    def write(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row of the metrics."""
        step = row["step"]
        values = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}

        def write(backend: Backend, entry: dict[str, Any]) -> None:
            if backend.takes_back or step > entry["logged"] or EVALUATED in row:  # an evaluation is written once, late
                backend.write(values, step=step)

        self._send(write)

    def show(self, image: Image.Image, step: int) -> None:
        """Send a preview to the trackers that do not have it yet."""

        def show(backend: Backend, entry: dict[str, Any]) -> None:
            if step > entry["shown"]:
                backend.show(image, step=step)
                entry["shown"] = step
                self._write_state()

        self._send(show)

    def _send(self, action: Callable[[Backend, dict[str, Any]], None]) -> None:
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._dropped += 1

    # In the thread

    def _run(self) -> None:
        for kind in self._kinds:
            with self._turned_off_if_it_fails(kind):
                self._start(kind)
        while (action := self._queue.get()) is not None:
            for kind, backend in list(self._backends.items()):
                with self._turned_off_if_it_fails(kind):
                    action(backend, self._state[kind])
        for kind, backend in list(self._backends.items()):
            with self._turned_off_if_it_fails(kind):
                backend.finish()

    def _start(self, kind: TrackerKind) -> None:
        log, entry = self._config.log, self._state[kind]
        name = log.name or self._run_dir.resolve().name
        of_run = {"run_dir": self._run_dir, "project": log.project, "name": name}
        backend = make_backend(kind, **of_run, id=entry["id"], step=self._step, logged=entry["logged"])
        if backend.takes_back:
            entry["shown"] = min(entry["shown"], self._step)
        entry["id"] = backend.id
        self._write_state()  # before it starts, so that no run of a killed process is forgotten
        where = backend.start(_shown(self._config))
        if entry["id"] != backend.id:
            entry["id"] = backend.id
            self._write_state()
        self._backends[kind] = backend
        if where:
            self._log(where)

    def _write_state(self) -> None:
        publish_text(self._run_dir / FILE, json.dumps({"format": 1, **self._state}, indent=1) + "\n")

    @contextmanager
    def _turned_off_if_it_fails(self, kind: TrackerKind) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._backends.pop(kind, None)
            why = kind_and_line(error)
            self._log(f"warning: log.trackers: {kind} failed and is off until the run is started again: {why}; metrics.jsonl has every row")


def _read_state(path: Path) -> dict[str, Any]:
    """Entries by tracker; none if there is no file yet. A damaged file counts as none: trackers then show a second run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {kind: _entry(**content[kind]) for kind in content if kind != "format"}
    except (ValueError, KeyError, TypeError, OSError):
        return {}


def _entry(*, id: str | None, logged: int, shown: int | None = None) -> dict[str, Any]:
    """shown: not in files of older versions, whose previews were sent up to `logged`."""
    return {"id": id, "logged": int(logged), "shown": int(logged if shown is None else shown)}


def _shown(config: Config) -> dict[str, Any]:
    """The values of a configuration by key, without environment variables, which may be keys of services."""
    cluster = config.cluster.model_copy(update={"env": {}})
    return _flat(yaml.safe_load(to_yaml(config.model_copy(update={"cluster": cluster}))))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1, "betas": [0, 1]}} → {"train.lr": 1, "train.betas": "[0, 1]"}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (str, bool, int, float)) or value is None else json.dumps(value)
    return flat
