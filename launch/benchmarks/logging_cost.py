"""Processor time of logging in a training step (`tim bench step`): reading losses, a row of the metrics, TensorBoard, the progress line.

Logging takes about a hundredth of a step, less than the times of two steps differ. So its calls are timed by themselves, in seconds of
processor time of all threads, and divided by those of a bare step of the same turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from launch.benchmarks.network import synchronise
from launch.config.run_sections import LogConfig
from launch.config.schema import Config
from launch.distributed.ranks import Ranks
from launch.logs.progress_line import ProgressLine
from launch.trackers.backends import make_backend
from launch.training.build import Parts
from launch.training.metrics import Meter, MetricsWriter, StepMeasure
from launch.training.step_losses import StepLosses, Sums
from launch.training.trainer import Trainer
from pipeline.loading.loader import Batch


class LoggedTrainer(Trainer):
    """Logs a row in every step, and measures what that costs."""

    def __init__(self, config: Config, parts: Parts, *, ranks: Ranks, writer: MetricsWriter, cleanup: ExitStack) -> None:
        super().__init__(config, parts, ranks=ranks)
        self._writer = writer
        self._progress = cleanup.enter_context(ProgressLine(steps=config.train.steps, done=0, quiet=True))
        self._spent = 0.0
        self._by_step: list[tuple[float, float]] = []  # seconds of what is done in every step, and of a row
        self.meter = _TimedMeter(self)

    def take_and_log(self) -> None:
        measure = self.take_step()
        of_step, self._spent = self._spent, 0.0
        with self.timed():
            row = self.row(measure)
            self._writer.write(row)
            self._progress.show(self.step, row)
        self._by_step.append((of_step, self._spent))
        self._spent = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the processor time of logging."""
        synchronise()
        start = time.process_time()
        yield
        self._spent += time.process_time() - start

    def costs(self, bare: Sequence[float]) -> dict[str, Any]:
        """Medians over the turns after the first. bare: processor seconds of the bare step of each turn."""
        of_step, of_row = np.array(self._by_step[1:]).T
        every, steps = LogConfig().every, np.array(bare[1:])
        shares = {"row_in_every_step": (of_step + of_row) / steps, "row_at_default": (of_step + of_row / every) / steps}
        return {
            "cpu_seconds_per_step": float(np.median(of_step)),
            "cpu_seconds_per_row": float(np.median(of_row)),
            "share_of_step": {name: float(np.median(share)) for name, share in shares.items()},
        }

    def _accumulate(self, batches: Sequence[Batch], *, count: int) -> Sums:
        losses = StepLosses(self._facts)
        for batch in batches:
            condition = self.parts.frozen.condition(batch)
            of_pack = self._losses(batch, condition)
            self.parts.engine.accumulate(of_pack.loss, count=count)
            losses.add(batch, of_pack, condition)
        with self.timed():
            return losses.sums(self.ranks)


def tensorboard_listener(config: Config, *, cleanup: ExitStack) -> Callable[[dict[str, Any]], None]:
    """What writes rows to TensorBoard at once, where a training has a thread for it."""
    assert config.run_dir is not None
    backend = make_backend("tensorboard", run_dir=config.run_dir, project="", name="", id=None, step=0, logged=0)
    backend.start({})
    cleanup.callback(backend.finish)

    def write(row: dict[str, Any]) -> None:
        backend.write({name: value for name, value in row.items() if isinstance(value, (int, float))}, step=row["step"])

    return write


class _TimedMeter(Meter):
    def __init__(self, trainer: LoggedTrainer) -> None:
        super().__init__()
        self._trainer = trainer

    def add(self, measure: StepMeasure) -> None:
        with self._trainer.timed():
            super().add(measure)
