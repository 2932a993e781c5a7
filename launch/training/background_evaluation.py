"""Evaluations of checkpoints in the training loop: start them, record their results, wait for the last one. All ranks call these."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from launch.checkpoints.saving.background import BackgroundSaver
from launch.config.schema import Config
from launch.distributed.heartbeat import HEARTBEAT
from launch.distributed.signals import Signals
from launch.evaluating.evaluations import Evaluations
from launch.training.metrics import MetricsWriter
from launch.training.trainer import Trainer

WAITING_SECONDS = 20.0  # between collectives while rank 0 waits for an evaluation, far below their timeout
LAST_SECONDS = 3600.0  # that the end of a run waits for the last evaluation


def start(trainer: Trainer, writer: MetricsWriter | None, *, log: Callable[[str], None], cleanup: ExitStack) -> Evaluations | None:
    """Evaluate checkpoints from now on, and go on with what an interrupted run has not finished. None on other ranks than 0, and if the
    configuration has no evaluations."""
    config = trainer.config
    if config.eval is None or config.run_dir is None or writer is None:
        return None
    device = config.eval.device or str(trainer.ranks.device)
    evaluations = Evaluations(config.run_dir, config.eval, corpus=_corpus(config), device=device, steps=config.train.steps, log=log)
    cleanup.enter_context(evaluations)
    evaluations.resume(trainer.step, logged=writer.evaluated)
    return evaluations


def record(evaluations: Evaluations | None, writer: MetricsWriter | None) -> None:
    """Write the evaluations that are finished into the metrics. Does not wait."""
    if evaluations is None or writer is None:
        return
    for row in evaluations.finished():
        writer.write_evaluation(row)


def wait_for_last(
    trainer: Trainer, evaluations: Evaluations | None, writer: MetricsWriter | None, saver: BackgroundSaver, *, signals: Signals
) -> None:
    """Wait for the evaluation of the last step, so that the model folder has it; not for ever, nor after a signal."""
    if trainer.config.eval is None:
        return
    deadline = time.monotonic() + LAST_SECONDS
    if evaluations is not None and (what := evaluations.in_progress) is not None:
        trainer.log(f"waiting for the {what}")
    is_over = False
    while not is_over:
        HEARTBEAT.section("save")
        is_done = evaluations is None or evaluations.wait(WAITING_SECONDS)
        is_over = trainer.ranks.broadcast(is_done or time.monotonic() > deadline or signals.asks_to_stop())
        record(evaluations, writer)
    if evaluations is not None and (what := evaluations.in_progress) is not None:
        trainer.log(f"warning: did not wait for the {what}: the same command goes on with it")
    saver.remove_superfluous()


def _corpus(config: Config) -> str:
    """The corpus of the real images: held-out ones if there are."""
    assert config.eval is not None
    held_out = config.validation.corpus if config.validation is not None else ()
    return config.eval.corpus or (*held_out, *config.corpus)[0].path
