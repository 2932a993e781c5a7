"""Training loop, from a configuration to a model folder.

The inputs of a step (samples, kinds, times, noise, learning rate) depend only on the configuration and the step number. A run that is
interrupted by a signal or a power cut therefore resumes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from launch.caption_lengths import caption_lengths
from launch.checkpoints import history, run_folder
from launch.checkpoints.export import export
from launch.checkpoints.resuming import find_checkpoint
from launch.checkpoints.saving.background import BackgroundSaver
from launch.checkpoints.saving.follow_ups import FollowUps
from launch.clusters.requeue import requeue
from launch.config.schema import Config, ConfigError
from launch.console import STOPPED
from launch.distributed.heartbeat import HEARTBEAT, quiet_if_connection_lost, remove_states
from launch.distributed.ranks import Ranks, process_group
from launch.distributed.self_watch import watched
from launch.distributed.signals import Signals, catch_signals
from launch.distributed.torchrun import die_with_launcher
from launch.evaluating.evaluations import Evaluations
from launch.guards import bad_samples
from launch.logs.progress_line import ProgressLine
from launch.logs.rank_log import RANK_LOG
from launch.logs.startup import STARTUP
from launch.previews.drawing import Previews
from launch.previews.files import forget_stale
from launch.trackers.trackers import Trackers
from launch.training import background_evaluation
from launch.training.build import build
from launch.training.checks import check_models
from launch.training.metrics import MetricsWriter
from launch.training.planning import make_planner
from launch.training.start_report import start_report
from launch.training.trainer import Trainer
from pipeline.planning.planner import Planner


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of a training run. `last_row` of the metrics is None if the run was already complete."""

    run_dir: Path
    model: Path
    steps: int
    last_row: dict[str, Any] | None


def train(config: Config, *, quiet: bool = False, replan: bool = False) -> TrainingResult:
    """Train, or resume the run in `run_dir`. Called by every process of the job (one, or those started by torchrun).

    With `replan`, a run resumes even if the inputs of its plan have changed (`launch.checkpoints.resuming`).

    Raises:
        ValueError: invalid configuration, corpus or checkpoint, or the run is in use.
        RuntimeError: the gradient is not finite again and again, the loss keeps rising, or too many samples are bad.
        SystemExit: code 75, after a signal stopped the run and a checkpoint was saved.
        KeyboardInterrupt: a second Ctrl-C; nothing is saved.
    """
    die_with_launcher()
    STARTUP.stage("planning")
    run_dir = config.run_dir
    if run_dir is None:
        raise ConfigError("run_dir: missing; give it in the file, or as run_dir=PATH on the command line")
    check_models(config)

    with quiet_if_connection_lost(), ExitStack() as after_cleanup, ExitStack() as cleanup:
        # processes
        signals = cleanup.enter_context(catch_signals())
        ranks = cleanup.enter_context(process_group(timeout=config.train.group_timeout))

        # plan and run folder
        planner = ranks.run_on_all_ranks(lambda: make_planner(config))
        _enter_run_folder(run_dir, limits=config.train.hang_limits, ranks=ranks, cleanup=cleanup)
        found, changes, recorded = ranks.run_on_rank0(
            lambda: (
                find_checkpoint(run_dir, mirror=config.checkpoint.mirror),
                run_folder.changes_on_resume(run_dir, config),
                history.read(run_dir),
            )
        )

        # parts
        parts = build(config, planner, ranks=ranks, cleanup=cleanup, found=found)
        trainer = Trainer(config, parts, ranks=ranks)

        # resume
        notes = ["--replan: no effect, this run has no checkpoint yet"] * replan
        if found is not None:
            notes = trainer.resume(found, recorded=recorded, replan=replan)
        ranks.run_on_rank0(lambda: _record_start(run_dir, trainer, changes=changes, replan=replan))

        # report
        writer = cleanup.enter_context(MetricsWriter(run_dir, step=trainer.step)) if ranks.is_main else None
        progress = cleanup.enter_context(ProgressLine(steps=config.train.steps, done=trainer.step, quiet=quiet or not ranks.is_main))
        told = {"step": trainer.step, "history": trainer.history, "found": found, "changes": changes}
        start = start_report(config, ranks, parts.parameters, trained=parts.trained, **told)
        for line in (*start, *notes, *_caption_warning(config, planner, ranks=ranks)):
            progress.log(line)
        previews = _watch(trainer, writer, log=progress.log, cleanup=cleanup)

        # checkpoints
        evaluations = background_evaluation.start(trainer, writer, log=progress.log, cleanup=cleanup)
        trainer.saver = saver = _open_saver(trainer, evaluations, resumed=found is not None, log=progress.log, cleanup=cleanup)

        # steps
        trainer.log = signals.log = progress.log
        record = partial(background_evaluation.record, evaluations, writer)
        row = _take_steps(trainer, saver, previews, signals=signals, writer=writer, progress=progress, after_step=record)
        if trainer.step < config.train.steps:
            _stop(trainer, signals, after_cleanup=after_cleanup)
        background_evaluation.wait_for_last(trainer, evaluations, writer, saver, signals=signals)

        # model folder
        HEARTBEAT.section("save")
        ranks.run_on_rank0(lambda: export(run_dir, out=run_dir / "model"))
        progress.log(f"model: {run_dir / 'model'}")
        return TrainingResult(run_dir=run_dir, model=run_dir / "model", steps=trainer.step, last_row=row)


def _enter_run_folder(run_dir: Path, *, limits: Mapping[str, float], ranks: Ranks, cleanup: ExitStack) -> None:
    """Take the run's lock, then write there what this rank is doing, and watch for ranks that hang."""
    ranks.run_on_rank0(lambda: (cleanup.enter_context(run_folder.exclusive_lock(run_dir)), remove_states(run_dir)))
    cleanup.enter_context(RANK_LOG.opened(run_dir, rank=ranks.rank, ranks=ranks.size))
    cleanup.enter_context(HEARTBEAT.opened(run_dir, rank=ranks.rank))
    cleanup.enter_context(watched(run_dir, limits=limits))
    STARTUP.stage("loading models and checkpoint, starting DeepSpeed")


def _record_start(run_dir: Path, trainer: Trainer, *, changes: Sequence[str], replan: bool) -> None:
    forget_stale(run_dir, trainer.config, step=trainer.step, changes=changes, replan=replan)
    run_folder.write_config(run_dir, trainer.config, history=trainer.history)
    bad_samples.forget_after(run_dir, step=trainer.step)


def _watch(trainer: Trainer, writer: MetricsWriter | None, *, log: Callable[[str], None], cleanup: ExitStack) -> Previews:
    """Start the trackers, which receive the rows of the `writer` on rank 0. Returns the previews, which they also receive."""
    config, parts = trainer.config, trainer.parts
    codec, encoder = parts.frozen.codec, parts.frozen.encoder
    encode = None if encoder is None else encoder.encode
    previews = Previews(config, parts.engine, parts.ema, trainer.ranks, codec, encode, log=log)
    previews.prepare()
    if writer is not None:
        trackers = cleanup.enter_context(Trackers(config, step=trainer.step, ahead=writer.ahead, log=log))
        writer.listeners.append(trackers.write)
        previews.show = trackers.show
    return previews


def _open_saver(
    trainer: Trainer, evaluations: Evaluations | None, *, resumed: bool, log: Callable[[str], None], cleanup: ExitStack
) -> BackgroundSaver:
    """What writes checkpoints, and copies them where they are mirrored: at once those that an interrupted run has not copied."""
    config, ranks = trainer.config, trainer.ranks
    assert config.run_dir is not None
    told = {} if evaluations is None else {"published": evaluations.add, "in_use": evaluations.uses}
    follow_ups = FollowUps(config.run_dir, config.checkpoint, **told) if ranks.is_main else None
    if follow_ups is not None and resumed:
        follow_ups.add_missing()
    return cleanup.enter_context(BackgroundSaver(config.run_dir, config.checkpoint, ranks=ranks, follow_ups=follow_ups, log=log))


def _take_steps(
    trainer: Trainer,
    saver: BackgroundSaver,
    previews: Previews,
    *,
    signals: Signals,
    writer: MetricsWriter | None,
    progress: ProgressLine,
    after_step: Callable[[], None],
) -> dict[str, Any] | None:
    """Take steps to the end of the run, or until a signal asks to stop; log, save and draw. Returns the last row of the metrics.

    after_step: called after each, when its row is complete.
    """
    config, signals.step = trainer.config, trainer.step + 1
    _validate_missed(trainer, signals, writer)
    previews.draw_if_due(trainer.step, stopping=signals.asks_to_stop)  # if the run was killed before it was drawn
    row, requests = None, trainer.agree(stop=signals.stop is not None)
    while trainer.step < config.train.steps and not requests.stop:
        measure = trainer.take_step()
        last = trainer.step == config.train.steps
        if last or trainer.step % config.log.every == 0 or trainer.is_validation_due(last=last):
            row = trainer.row(measure)
            if writer:
                writer.write(row)
        saver.after_step()
        is_due = last or saver.is_due(trainer.step)
        if is_due:
            trainer.save(saver)
        if validated := _validate(trainer, signals, writer):
            row = {**(row or {}), **validated}
        progress.show(trainer.step, row)
        if previews.draw_if_due(trainer.step, stopping=signals.asks_to_stop):
            trainer.meter.pause()
        after_step()
        signals.step = trainer.step + 1
        requests = trainer.agree(stop=signals.stop is not None, save=signals.take_save_request())
        if (requests.stop or requests.save) and not is_due:
            trainer.save(saver)
    saver.finish()
    return row


def _validate(trainer: Trainer, signals: Signals, writer: MetricsWriter | None) -> dict[str, Any]:
    """Measure the validation losses of a step, if they are due, and add them to its row. {} if a signal stopped that."""
    columns = trainer.validate(last=trainer.step == trainer.config.train.steps, stopping=signals.asks_to_stop)
    if columns:
        columns |= trainer.meter.clock.column("validation")
        if writer:
            writer.add_to_last(columns)
    return columns


def _validate_missed(trainer: Trainer, signals: Signals, writer: MetricsWriter | None) -> None:
    """Validate the step that the run resumes from, if it was killed or stopped before that was done."""
    row = writer.last if writer else None
    missed = row is not None and row["step"] == trainer.step and "validation_images" not in row
    if trainer.ranks.broadcast(missed):
        _validate(trainer, signals, writer)


def _caption_warning(config: Config, planner: Planner, *, ranks: Ranks) -> list[str]:
    """A line about captions that are too long for the text encoder, if there are any; on rank 0."""
    lengths = caption_lengths(config, planner) if ranks.is_main else None
    return [f"warning: {lengths}"] if lengths is not None and lengths.cut else []


def _stop(trainer: Trainer, signals: Signals, *, after_cleanup: ExitStack) -> NoReturn:
    """Exit after a signal, which may have reached other ranks only. Under Slurm rank 0 may requeue the job, which ends its processes."""
    trainer.log(f"stopped by a signal after step {trainer.step}: run the same command again to continue")
    number = max(trainer.ranks.gather(signals.stop or 0))
    if trainer.ranks.is_main:
        after_cleanup.callback(requeue, number, log=trainer.log)
    raise SystemExit(STOPPED)
