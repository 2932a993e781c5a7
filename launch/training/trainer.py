"""Training loop, from a configuration to a model folder.

The inputs of a step (samples, kinds, times, noise, learning rate) depend only on the configuration and the step number. A run that is
interrupted by a signal or a power cut therefore resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.caption_lengths import caption_lengths
from launch.checkpoints import checkpoint, history, run_folder
from launch.checkpoints.export import export
from launch.checkpoints.history import History
from launch.checkpoints.resuming import restore_plan, trainer_state
from launch.config.schema import Config, ConfigError, TrainConfig, digest
from launch.console import STOPPED
from launch.distributed.ranks import Ranks, process_group
from launch.distributed.signals import catch_signals
from launch.distributed.torchrun import die_with_launcher
from launch.training import guidance_network
from launch.training.build import Parts, build, make_network
from launch.training.checks import check_models
from launch.training.guidance_network import GuidanceNetwork
from launch.training.metrics import Meter, MetricsWriter, ProgressLine, StepMeasure
from launch.training.planning import make_planner
from launch.training.start_report import start_report
from launch.training.step_losses import StepLosses
from pipeline.loading.loader import Batch, LoadedStep
from tim.objective import Guide, Losses

MAX_SKIPPED = 10  # consecutive steps with a gradient that is not finite


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
        RuntimeError: the loss is not finite, or too many images cannot be loaded.
        SystemExit: code 75, after a signal stopped the run and a checkpoint was saved.
    """
    die_with_launcher()
    run_dir = config.run_dir
    if run_dir is None:
        raise ConfigError("run_dir: missing; give it in the file, or as run_dir=PATH on the command line")
    check_models(config)

    with ExitStack() as cleanup:
        # processes
        signals = cleanup.enter_context(catch_signals())
        ranks = cleanup.enter_context(process_group())

        # plan and run folder
        planner = ranks.run_on_all_ranks(lambda: make_planner(config))
        ranks.run_on_rank0(lambda: cleanup.enter_context(run_folder.exclusive_lock(run_dir)))
        found, changes, recorded = ranks.run_on_rank0(
            lambda: (checkpoint.newest(run_dir), run_folder.changes_on_resume(run_dir, config), history.read(run_dir))
        )

        # parts
        parts = build(config, planner, ranks=ranks, cleanup=cleanup, is_new=found is None)
        trainer = Trainer(config, parts, ranks=ranks)

        # resume
        notes = ["--replan: no effect, this run has no checkpoint yet"] * replan
        if found is not None:
            notes = trainer.resume(found, recorded=recorded, replan=replan)
        ranks.run_on_rank0(lambda: run_folder.write_config(run_dir, config, history=trainer.history))

        # report
        writer = cleanup.enter_context(MetricsWriter(run_dir, step=trainer.step)) if ranks.is_main else None
        progress = cleanup.enter_context(ProgressLine(steps=config.train.steps, done=trainer.step, quiet=quiet or not ranks.is_main))
        start = {"parameters": parts.parameters, "step": trainer.step, "history": trainer.history, "found": found, "changes": changes}
        for line in (*start_report(config, ranks, **start), *notes):
            progress.log(line)
        lengths = caption_lengths(config, planner) if ranks.is_main else None
        if lengths is not None and lengths.cut:
            progress.log(f"warning: {lengths}")

        # steps
        row = None
        while trainer.step < config.train.steps:
            measure, stop = trainer.take_step(stop=signals.caught is not None)
            last = trainer.step == config.train.steps
            if last or trainer.step % config.log.every == 0:
                row = trainer.meter.row(trainer.step, measure)
                if writer:
                    writer.write(row)
            progress.show(trainer.step, row)
            if last or stop or trainer.step % config.checkpoint.every == 0:
                progress.log(f"saved {trainer.save(run_dir)}")
            if stop and not last:
                progress.log(f"stopped by a signal after step {trainer.step}: run the same command again to continue")
                raise SystemExit(STOPPED)

        # model folder
        model = run_dir / "model"
        ranks.run_on_rank0(lambda: export(run_dir, out=model))
        progress.log(f"model: {model}")
        return TrainingResult(run_dir=run_dir, model=model, steps=trainer.step, last_row=row)


class Trainer:
    """Runs steps, saves checkpoints and resumes. Every public method must be called by all ranks."""

    def __init__(self, config: Config, parts: Parts, *, ranks: Ranks) -> None:
        self.config = config
        self.parts = parts
        self.ranks = ranks
        self.history = parts.history
        self.guidance_network: GuidanceNetwork | None = None  # created at the first step with guidance
        self.meter = Meter()
        self.step = 0
        self._skipped = 0  # consecutive steps
        self._steps: Iterator[LoadedStep] | None = None

    def take_step(self, *, stop: bool) -> tuple[StepMeasure, bool]:
        """Update the weights once. Returns the measurements, and whether any rank received a stop signal."""
        # data
        if self._steps is None:
            self._steps = iter(self.parts.loader)
            self.meter.pause()
        loaded = next(self._steps)
        self._refresh_guidance_network()

        # forward and backward, pack by pack
        losses = StepLosses()
        for index, batch in enumerate(loaded.batches):
            losses.add(batch, self._accumulate(batch, count=loaded.images, last=index == len(loaded.batches) - 1))
        sums = losses.sums(self.ranks, stop=stop)

        # update
        lr = learning_rate(self.step, self.config.train)
        engine, ema = self.parts.engine, self.parts.ema
        result = engine.step(lr=lr)
        ema.update(engine.fragments(), updates=self.step)
        self.step += 1
        self._skipped = 0 if result.applied else self._skipped + 1
        if self._skipped == MAX_SKIPPED:
            remedy = "lower train.lr, or use train.precision=fp32"
            raise RuntimeError(f"the gradient was not finite in the {MAX_SKIPPED} steps up to {self.step}: {remedy}")

        # metrics
        measure = StepMeasure(
            ids=loaded.ids,
            raw=sums.raw,
            raw_images=sums.raw_images,
            grad_norm=result.grad_norm,
            applied=result.applied,
            lr=lr,
            images=loaded.images - sums.failed,
            failed=sums.failed,
            tokens=loaded.tokens,
            fill=loaded.fill,
            alignment=sums.alignment if self.config.objective.alignment else None,
        )
        self.meter.add(measure)
        return measure, sums.stop

    def _accumulate(self, batch: Batch, *, count: int, last: bool) -> Losses:
        """Forward and backward pass of one pack. count: images planned in the step on all ranks; last: last pack of this rank."""
        parts = self.parts
        losses = parts.objective(
            parts.engine,
            parts.frozen.latents(batch),
            parts.frozen.condition(batch),
            noise=batch.noise,
            kinds=batch.kinds,
            uniforms=batch.uniforms,
            weights=batch.weights,
            derivative_network=parts.engine.module,
            guide=self._guide(len(batch.ids)),
            teacher=parts.frozen.teacher_tokens(batch),
        )
        parts.engine.accumulate(losses.loss, count=count, last=last)
        return losses

    def _refresh_guidance_network(self) -> None:
        """Refresh the EMA copy used for guidance on scheduled steps. Depends only on the step number."""
        guidance = self.config.objective.guidance
        if guidance is None or self.step < guidance.after:
            return
        if self.guidance_network is None:
            self.guidance_network = self._new_guidance_network()
        elif (self.step - guidance.after) % guidance.refresh:
            return
        self.guidance_network.update_from(self.parts.ema.average)

    def _new_guidance_network(self) -> GuidanceNetwork:
        with torch.device("meta"):
            network = make_network(self.config.network)
        return GuidanceNetwork(network, ranks=self.ranks)

    def _guide(self, images: int) -> Guide | None:
        """Guidance for the targets of a pack of `images` images; None before guidance starts."""
        guidance = self.config.objective.guidance
        if guidance is None or self.guidance_network is None:
            return None
        unconditional = self.parts.frozen.no_condition(images)
        return Guide(self.guidance_network, unconditional, w_gt=guidance.w_gt, w_cond=guidance.w_cond, interval=guidance.interval)

    def save(self, run_dir: Path) -> Path:
        """Write a checkpoint of this step."""
        metadata = checkpoint.CheckpointMetadata(step=self.step, world_size=self.ranks.size, config_hash=digest(self.config))
        folder = checkpoint.save(run_dir, metadata, ranks=self.ranks, write=self._write_part, keep_last=self.config.checkpoint.keep_last)
        self.meter.pause()
        return folder

    def resume(self, found: checkpoint.Checkpoint, *, recorded: History, replan: bool) -> list[str]:
        """Resume from a checkpoint of any number of ranks. Returns log lines about its plan (`launch.checkpoints.resuming.restore_plan`).

        Raises ValueError if its network, optimizer or plan differs.
        """
        state, self.history, notes = self.ranks.run_on_all_ranks(lambda: self._restore_state(found, recorded=recorded, replan=replan))
        self.parts.engine.load(found.pieces, updates=state["updates"])
        found.pieces("ema").read_into(self.parts.ema.average)
        if (found.folder / guidance_network.FILE).is_file():
            self.guidance_network = self._new_guidance_network()
            self.guidance_network.load(found.folder)
        self.meter.load_state_dict(state["meter"])
        self.step = found.metadata.step
        return notes

    def _restore_state(self, found: checkpoint.Checkpoint, *, recorded: History, replan: bool) -> tuple[dict[str, Any], History, list[str]]:
        """Restore the plan of a checkpoint. Returns its trainer state, the run's history, and log lines."""
        state = trainer_state(found, config=self.config, shapes=self.parts.engine.shapes)
        past, notes = restore_plan(
            self.parts.loader,
            state,
            planner=self.parts.planner,
            recorded=recorded,
            config=self.config,
            folder=found.folder,
            replan=replan,
        )
        return state, past, notes

    def _write_part(self, folder: Path) -> list[Path]:
        """Write this rank's part of a checkpoint."""
        engine = self.parts.engine
        pieces = {"weights": engine.fragments(), "ema": self.parts.ema.average, **engine.moments()}
        written = checkpoint.write_pieces(folder, pieces, rank=self.ranks.rank, shapes=engine.shapes)
        if self.ranks.is_main:
            state = {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "updates": engine.updates,
                "optimizer": self.config.train.optimizer,
                "data": self.parts.loader.state_dict(),
                "meter": self.meter.state_dict(),
                "history": self.history.to_json(),
            }
            written.append(checkpoint.write_trainer_state(folder, state))
            if self.guidance_network is not None:
                written.append(self.guidance_network.save(folder))
        return written


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of the update from `step` to `step + 1`. Depends only on the step, not on the number of ranks."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
