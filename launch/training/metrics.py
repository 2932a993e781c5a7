"""Training metrics: rows in metrics.jsonl.

    {"step": 20, "loss": 0.93, "loss_diffusion": …, "loss_consistency": …, "loss_transition": …, "loss_t_0_20": …, "loss_tokens_64": …,
     "lr": …, "grad_norm": …, "images": 2560, "tokens": 81920, …, "seconds": …, "seconds_data": …, "ids_digest": "…", "first_ids": […]}

docs/training.md describes every column. Those of `launch.training.measuring.usage` and of a validation are added to `Meter.row`.

`loss` is the mean unweighted error of all images since the last row, `loss_KIND` that of one kind; null if there were none, or if it is not
finite, which JSON cannot express. The minimised loss is not logged: it is normalised by each image's own error, so its value is not
informative. `loss_alignment` is the mean distance from the alignment teacher (null without one). `fill` and `grad_norm` are means over the
steps. `images`, `tokens`, `failed` (images without weight, among them the `bad_samples` that made the loss non-finite), the other counts,
`restarts` and `seconds` (training only) count from the start of the run. `ids_digest` chains the ids of all samples so far: two runs with
equal digests saw the same samples in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.checkpoints.evaluation_results import STEP as EVALUATED
from launch.checkpoints.run_folder import METRICS
from launch.training.measuring.bins import BINNED, bin_columns, finite_or_none, mean_or_none
from launch.training.measuring.section_clock import SectionClock
from pipeline.cost import KIND_NAMES
from pipeline.storage.atomic import publish_text

FIRST_IDS = 4
_BUFFER = 1 << 20  # bytes, more than a row has
COUNTERS = ("images", "tokens", "failed", "skipped_steps", "bad_samples", "loss_spikes", "rollbacks", "repeated_derivatives")


@dataclass(slots=True)
class Sums:
    """Sums over the steps since the last row."""

    steps: int = 0
    grad_norm: float = 0.0
    fill: float = 0.0
    images: int = 0
    tokens: int = 0
    raw: list[float] = field(default_factory=lambda: [0.0] * len(KIND_NAMES))
    raw_images: list[int] = field(default_factory=lambda: [0] * len(KIND_NAMES))
    alignment: float | None = None
    binned: list[float] = field(default_factory=lambda: [0.0] * BINNED)
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class StepMeasure:
    """One step, summed over ranks.

    raw, raw_images: error sums and image counts by kind; alignment: sum of distances from the teacher; binned, flops: as in
    `launch.training.step_losses.Sums`.
    """

    ids: tuple[str, ...]
    raw: Sequence[float]
    raw_images: Sequence[int]
    grad_norm: float
    applied: bool
    lr: float
    images: int
    failed: int
    tokens: int
    fill: float
    alignment: float | None = None
    binned: Sequence[float] = (0.0,) * BINNED
    flops: float = 0.0


class Meter:
    """Accumulate steps into rows. The state is plain JSON, so that a resumed run continues in the middle of a row."""

    def __init__(self) -> None:
        self._since = Sums()
        self._total: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.clock = SectionClock()
        self._seconds = 0.0
        self._digest = ""
        self._clock = time.monotonic()
        self._row_seconds = 0.0
        self.restarts = 0  # how often the run has been resumed

    def add(self, measure: StepMeasure) -> None:
        since, total = self._since, self._total
        since.steps += 1
        since.fill += measure.fill
        since.grad_norm += measure.grad_norm
        since.images += measure.images
        since.tokens += measure.tokens
        since.raw = [a + b for a, b in zip(since.raw, measure.raw, strict=True)]
        since.raw_images = [a + int(b) for a, b in zip(since.raw_images, measure.raw_images, strict=True)]
        since.binned = [a + b for a, b in zip(since.binned, measure.binned, strict=True)]
        since.flops += measure.flops
        if measure.alignment is not None:
            since.alignment = (since.alignment or 0.0) + measure.alignment
        total["images"] += measure.images
        total["tokens"] += measure.tokens
        total["failed"] += measure.failed
        total["skipped_steps"] += not measure.applied
        self._digest = hashlib.sha256("\n".join([self._digest, *measure.ids]).encode()).hexdigest()[:16]
        now = time.monotonic()
        self._seconds += now - self._clock
        self._row_seconds += now - self._clock
        self._clock = now

    def count(self, name: str, number: int) -> None:
        """Count an event outside `add`."""
        self._total[name] += number

    def total(self, name: str) -> int:
        """A counter since the start of the run."""
        return self._total[name]

    def row(self, step: int, last: StepMeasure) -> dict[str, Any]:
        """Return the row for the steps since the last one, and start the next."""
        since, seconds, images = self._since, max(self._row_seconds, 1e-9), sum(self._since.raw_images)
        row = {
            "step": step,
            "loss": mean_or_none(sum(since.raw), images),
            **{f"loss_{kind}": mean_or_none(*sums) for kind, *sums in zip(KIND_NAMES, since.raw, since.raw_images, strict=True)},
            **bin_columns(since.binned),
            "loss_alignment": None if since.alignment is None else mean_or_none(since.alignment, images),
            "lr": last.lr,
            "grad_norm": finite_or_none(since.grad_norm / since.steps),
            **self._total,
            "fill": since.fill / since.steps,
            "images_per_second": since.images / seconds,
            "tokens_per_second": since.tokens / seconds,
            "flops_per_second": since.flops / seconds,
            "seconds": self._seconds,
            **self.clock.columns(),
            "restarts": self.restarts,
            "ids_digest": self._digest,
            "first_ids": list(last.ids[:FIRST_IDS]),
        }
        self._since = Sums()
        self._row_seconds = 0.0
        return row

    @property
    def seconds(self) -> float:
        """Training time since the start of the run."""
        return self._seconds

    def pause(self) -> None:
        """Exclude the time until now from the training time."""
        self._clock = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {
            "since": asdict(self._since),
            "total": self._total,
            "seconds": self._seconds,
            "row_seconds": self._row_seconds,
            "digest": self._digest,
            "sections": self.clock.seconds,
            "restarts": self.restarts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since = Sums(**state["since"])
        self._total = {**dict.fromkeys(COUNTERS, 0), **state["total"]}
        self.clock.seconds |= state.get("sections", {})  # not in older checkpoints
        self.restarts = state.get("restarts", 0)  # likewise
        self._seconds, self._row_seconds, self._digest = state["seconds"], state["row_seconds"], state["digest"]
        self.pause()


class MetricsWriter:
    """Append rows to RUN/metrics.jsonl. Rows after `step`, from an interrupted run, are removed.

    ahead: step of the last row before that, 0 if there was none. last: the last row, None if there is none. evaluated: steps that have a
    row of an evaluation; those rows come when an evaluation is finished, after rows of later steps. listeners: receive every new row, and
    every part that is added to one.
    """

    def __init__(self, run_dir: Path, *, step: int) -> None:
        path = run_dir / METRICS
        rows = read_rows(path)
        kept = sorted((row for row in rows if row["step"] <= step), key=lambda row: (row["step"], EVALUATED not in row))
        lines = [_line(row) for row in kept]
        publish_text(path, "".join(lines))
        self.ahead: int = max((row["step"] for row in rows), default=0)
        self.evaluated = {row["step"] for row in kept if EVALUATED in row}
        self.last: dict[str, Any] | None = kept[-1] if kept else None
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._file = path.open("r+b", buffering=_BUFFER)
        self._start = self._file.seek(0, os.SEEK_END) - len(lines[-1].encode() if lines else b"")  # of the last row

    def write(self, row: dict[str, Any]) -> None:
        self._start = self._file.seek(0, os.SEEK_END)
        self._put(row)
        self._tell(row)

    def write_evaluation(self, row: dict[str, Any]) -> None:
        """Append the row of an evaluated step, which has the column `eval/step`. Nothing can be added to the row before it any more."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(_line(row).encode())
        self._file.flush()
        self.evaluated.add(row["step"])
        self._tell(row)

    def add_to_last(self, columns: Mapping[str, Any]) -> None:
        """Add columns to the last row."""
        assert self.last is not None, "there is a row to add to"
        self._put({**self.last, **columns})
        self._tell({"step": self.last["step"], **columns})

    def _put(self, row: dict[str, Any]) -> None:
        """Write the last row, over a shorter one. A process that is killed leaves either: it is one call of the system."""
        self._file.seek(self._start)
        self._file.write(_line(row).encode())
        self._file.flush()
        self.last = row

    def _tell(self, part: dict[str, Any]) -> None:
        for listener in self.listeners:
            listener(part)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. Ignores a last line truncated by a crash; raises ValueError for any other invalid line.

    NaN and Infinity, which Python's JSON writes and other readers refuse, are None.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line, parse_constant=lambda _: None) for line in lines if line.endswith("\n")]


def last_row(path: Path) -> dict[str, Any] | None:
    """The last row of a training step in a metrics file, None if there is none. Rows of evaluations are passed over."""
    return next((row for row in reversed(read_rows(path)) if EVALUATED not in row), None)
