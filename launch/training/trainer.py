"""The training loop, from a configuration to a model folder.

Everything that decides a step (samples, kinds, times, noise, learning rate) is a function of the configuration and the step's number.
That is why a run that was stopped, by a signal or by a power cut, continues as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.caption_lengths import caption_lengths
from launch.checkpoints import checkpoint, history, run_folder
from launch.checkpoints.export import export
from launch.checkpoints.history import History
from launch.checkpoints.resuming import restore_plan, trainer_state
from launch.config.schema import Config, ConfigError, TrainConfig, digest
from launch.console import STOPPED
from launch.distributed.ranks import Ranks, process_group
from launch.distributed.torchrun import die_with_launcher
from launch.training import guidance_network
from launch.training.build import check_models, make_cache, make_encoder, make_planner
from launch.training.ema import ShardedEMA
from launch.training.engine import Engine
from launch.training.guidance_network import GuidanceNetwork
from launch.training.initial import load_initial, other_surroundings
from launch.training.metrics import Meter, MetricsWriter, ProgressLine, StepMeasure
from launch.training.signals import listening
from launch.training.step_losses import StepLosses
from pipeline.loading.feature_reader import empty_text
from pipeline.loading.loader import Batch, LoadedStep, Loader
from pipeline.planning.planner import Planner
from tim import PackedText, TransitionObjective, TransitionTransformer, alignment, codecs, transports
from tim.attention.dispatch import AttentionRequirements, choose_backend
from tim.objective import Guide
from tim.packed import Condition

MAX_SKIPPED = 10  # steps in a row whose gradient was not finite


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What came of a run: its folder, the model in it, and the last row of its metrics (None if there was nothing left to do)."""

    run_dir: Path
    model: Path
    steps: int
    last_row: dict[str, Any] | None


def train(config: Config, *, quiet: bool = False, replan: bool = False) -> TrainingResult:
    """Train, or continue the run that `run_dir` holds. One process, or one of those that torchrun started; all call it alike.

    With `replan`, a run goes on although its plan's inputs have changed (`launch.checkpoints.resuming`).

    Raises:
        ValueError: an impossible configuration, a corpus or a checkpoint that is not one, a run in use.
        RuntimeError: a loss that is not finite, too many images that cannot be loaded.
        SystemExit: code 75, after a signal stopped the run and it has saved.
    """
    die_with_launcher()
    run_dir = config.run_dir
    if run_dir is None:
        raise ConfigError("run_dir: missing; give it in the file, or as run_dir=PATH on the command line")
    check_models(config)

    with ExitStack() as cleanup:
        signals = cleanup.enter_context(listening())
        ranks = cleanup.enter_context(process_group())
        planner = ranks.run_on_all_ranks(lambda: make_planner(config))
        ranks.run_on_rank0(lambda: cleanup.enter_context(run_folder.exclusive_lock(run_dir)))
        found, changes, recorded = ranks.run_on_rank0(
            lambda: (checkpoint.newest(run_dir), run_folder.changes_on_resume(run_dir, config), history.read(run_dir))
        )

        trainer = Trainer(config, planner, ranks=ranks, cleanup=cleanup, is_new=found is None)
        notes = ["--replan: this run has no checkpoint yet, it begins as planned"] * replan
        if found is not None:
            notes = trainer.resume(found, recorded=recorded, replan=replan)
        ranks.run_on_rank0(lambda: run_folder.write_config(run_dir, config, history=trainer.history))
        writer = cleanup.enter_context(MetricsWriter(run_dir, step=trainer.step)) if ranks.is_main else None
        progress = cleanup.enter_context(ProgressLine(steps=config.train.steps, done=trainer.step, quiet=quiet or not ranks.is_main))
        for line in (*_introduction(config, ranks, trainer, found=found, changes=changes), *notes):
            progress.say(line)
        lengths = caption_lengths(config, planner) if ranks.is_main else None
        if lengths is not None and lengths.cut:
            progress.say(f"warning: {lengths}")

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
                progress.say(f"saved {trainer.save(run_dir)}")
            if stop and not last:
                progress.say(f"stopped by a signal after step {trainer.step}: run the same command again to continue")
                raise SystemExit(STOPPED)

        model = run_dir / "model"
        ranks.run_on_rank0(lambda: export(run_dir, out=model))
        progress.say(f"model: {model}")
        return TrainingResult(run_dir=run_dir, model=model, steps=trainer.step, last_row=row)


class Trainer:
    """The parts of a run, put together, and what is done with them: `take_step`, `save`, `resume`. All ranks call each alike."""

    def __init__(self, config: Config, planner: Planner, *, ranks: Ranks, cleanup: ExitStack, is_new: bool = True) -> None:
        """`is_new`: whether the run begins, and so with the weights of `train.init`, if there are any."""
        params, chosen = config.network.params, config.objective
        self.config = config
        self.ranks = ranks
        self.planner = planner
        self.geometry = codecs.geometry(config.codec.kind, config.codec.path)
        features = planner.corpora[0].features
        parts = () if features is None else features.parts
        self.codec = None
        if "latents" not in parts:
            self.codec = ranks.run_on_all_ranks(lambda: codecs.make(config.codec.kind, config.codec.path, device=ranks.device))
        self.empty_text = None if features is None or features.empty is None else empty_text(features.empty)
        self.encoder = None
        if params.cap_feat_dim is not None and "captions" not in parts:
            self.encoder = ranks.run_on_all_ranks(lambda: make_encoder(config, device=ranks.device))
        self.objective = TransitionObjective(
            transports.make(chosen.transport, **chosen.transport_settings()),
            patch_size=params.patch_size,
            derivative=chosen.derivative,
            derivative_precision=chosen.derivative_precision,
            epsilon=chosen.epsilon,
            weighting=chosen.weighting,
            shift=chosen.shift,
            pixels_per_cell=self.geometry.factor,
            alignment=chosen.alignment.weight if chosen.alignment else 1.0,
            equal_forwards=config.train.zero == 3,
        )
        self.teacher = None
        if chosen.alignment and "teacher" not in parts:
            kind, path = chosen.alignment.kind, chosen.alignment.path
            assert path is not None, "check_models has seen to it"
            self.teacher = ranks.run_on_all_ranks(lambda: alignment.make(kind, path, device=ranks.device, precision=config.train.precision))
            if self.teacher.width != params.z_dim:
                raise ConfigError(f"network.params.z_dim: {params.z_dim} given, but the teacher {path} is {self.teacher.width} wide")
        self.loader = Loader(
            planner,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.size,
            lockstep=config.train.lockstep,
            channels=self.geometry.channels,
            factor=self.geometry.factor,
            stochastic_codec=self.codec is not None and self.codec.is_stochastic,
            teacher=chosen.alignment is not None,
            workers=config.loader.workers,
            prefetch=config.loader.prefetch,
            max_bad_fraction=config.loader.max_bad_fraction,
            on_bad_shard=config.loader.on_bad_shard,
            verify=config.loader.verify,
            cache=make_cache(config),
            timeout=config.loader.timeout,
            device=ranks.device,
        )
        cleanup.callback(self.loader.close)
        torch.manual_seed(config.seed)
        network = self._new_network()
        self.history = History(init=ranks.run_on_all_ranks(lambda: load_initial(network, config)) if is_new else None)
        self.null_class = network.null_class
        network.configure_execution(**execution(config.train, ranks.device))
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.engine = Engine(
            network,
            ranks=ranks,
            stage=config.train.zero,
            precision=config.train.precision,
            optimizer=config.train.optimizer,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            clip=config.train.clip,
        )
        cleanup.callback(self.engine.close)
        self.ema = ShardedEMA(self.engine.fragments(), decay=config.train.ema)
        self.guidance_network: GuidanceNetwork | None = None  # from the first step that is guided
        self.meter = Meter()
        self.step = 0
        self._skipped = 0  # steps in a row
        self._steps: Iterator[LoadedStep] | None = None

    def take_step(self, *, stop: bool) -> tuple[StepMeasure, bool]:
        """One update of the weights. Returns what was measured, and whether any rank wants to stop."""
        if self._steps is None:
            self._steps = iter(self.loader)
            self.meter.pause()
        loaded = next(self._steps)
        self._refresh_guidance_network()
        tally = StepLosses()
        for index, batch in enumerate(loaded.batches):
            losses = self.objective(
                self.engine,
                self._latents(batch),
                self._condition(batch.captions, batch.labels, batch.texts),
                noise=batch.noise,
                kinds=batch.kinds,
                uniforms=batch.uniforms,
                weights=batch.weights,
                derivative_network=self.engine.module,
                guide=self._guide(len(batch.ids)),
                teacher=self.teacher.tokens(batch.images, self._grids(batch)) if self.teacher else batch.teacher,
            )
            self.engine.accumulate(losses.loss, count=loaded.images, last=index == len(loaded.batches) - 1)
            tally.add(batch, losses)
        sums = tally.sums(self.ranks, stop=stop)

        lr = learning_rate(self.step, self.config.train)
        result = self.engine.step(lr=lr)
        self.ema.update(self.engine.fragments(), updates=self.step)
        self.step += 1
        self._skipped = 0 if result.applied else self._skipped + 1
        if self._skipped == MAX_SKIPPED:
            remedy = "lower train.lr, or use train.precision=fp32"
            raise RuntimeError(f"the gradient was not finite in the {MAX_SKIPPED} steps up to {self.step}: {remedy}")
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

    def _refresh_guidance_network(self) -> None:
        """Fill the copy of the averaged network where this step is to: a function of the step alone."""
        guidance = self.config.objective.guidance
        if guidance is None or self.step < guidance.after:
            return
        if self.guidance_network is None:
            self.guidance_network = self._new_guidance_network()
        elif (self.step - guidance.after) % guidance.refresh:
            return
        self.guidance_network.fill(self.ema.average)

    def _new_network(self) -> TransitionTransformer:
        network = self.config.network
        return TransitionTransformer.from_official(network.params.model_dump(exclude_none=True), rope=network.rope)

    def _new_guidance_network(self) -> GuidanceNetwork:
        with torch.device("meta"):
            network = self._new_network()
        return GuidanceNetwork(network, ranks=self.ranks)

    def _guide(self, images: int) -> Guide | None:
        """What takes part in the targets of a pack of so many images."""
        guidance = self.config.objective.guidance
        if guidance is None or self.guidance_network is None:
            return None
        empty = None if self.empty_text is None else [self.empty_text] * images
        nothing = self._condition([""] * images, torch.full((images,), -1), empty)
        return Guide(self.guidance_network, nothing, w_gt=guidance.w_gt, w_cond=guidance.w_cond, interval=guidance.interval)

    def _grids(self, batch: Batch) -> list[tuple[int, int]]:
        """Rows and columns of every image's tokens."""
        stride = self.geometry.factor * self.config.network.params.patch_size
        return [(image.shape[1] // stride, image.shape[2] // stride) for image in batch.images]

    def _latents(self, batch: Batch) -> list[Tensor]:
        if batch.latents is not None:
            return batch.latents
        assert self.codec is not None
        means, deviations = self.codec.latents(batch.images)
        if deviations is None:
            return means
        assert batch.codec_noise is not None
        return [mean + spread * noise for mean, spread, noise in zip(means, deviations, batch.codec_noise, strict=True)]

    def _condition(self, captions: Sequence[str], classes: Tensor, texts: Sequence[Tensor] | None) -> Condition:
        """What images are to show. The empty caption and class −1 ask for nothing in particular. `texts` are captions already encoded."""
        if self.encoder is not None:
            return PackedText.from_features(self.encoder.encode(captions))
        if texts is not None and self.config.condition == "text":
            return PackedText.from_features([text.to(self.ranks.device) for text in texts])
        none = 0 if self.null_class is None else self.null_class  # without a null class, only the dummy of an empty pack has none
        return classes.where(classes >= 0, none).to(self.ranks.device)

    def save(self, run_dir: Path) -> Path:
        """Write a checkpoint of this step."""
        metadata = checkpoint.CheckpointMetadata(step=self.step, world_size=self.ranks.size, config_hash=digest(self.config))
        folder = checkpoint.save(run_dir, metadata, ranks=self.ranks, write=self._write_part, keep_last=self.config.checkpoint.keep_last)
        self.meter.pause()
        return folder

    def resume(self, found: checkpoint.Checkpoint, *, recorded: History, replan: bool) -> list[str]:
        """Continue from a checkpoint, of however many ranks. Returns what to say of its plan (`launch.checkpoints.resuming.restore_plan`).

        Raises ValueError if it is of another network, optimizer or plan.
        """
        state, self.history, notes = self.ranks.run_on_all_ranks(lambda: self._accept(found, recorded=recorded, replan=replan))
        self.engine.load(found.pieces, updates=state["updates"])
        found.pieces("ema").fill(self.ema.average)
        if (found.folder / guidance_network.FILE).is_file():
            self.guidance_network = self._new_guidance_network()
            self.guidance_network.load(found.folder)
        self.meter.load_state_dict(state["meter"])
        self.step = found.metadata.step
        return notes

    def _accept(self, found: checkpoint.Checkpoint, *, recorded: History, replan: bool) -> tuple[dict[str, Any], History, list[str]]:
        """The trainer's part of a checkpoint, the run's history and what to say of it, with the loader set to its place."""
        state = trainer_state(found, config=self.config, shapes=self.engine.shapes)
        past, notes = restore_plan(
            self.loader, state, planner=self.planner, recorded=recorded, config=self.config, folder=found.folder, replan=replan
        )
        return state, past, notes

    def _write_part(self, folder: Path) -> list[Path]:
        """This rank's part of a checkpoint."""
        pieces = {"weights": self.engine.fragments(), "ema": self.ema.average, **self.engine.moments()}
        written = checkpoint.write_pieces(folder, pieces, rank=self.ranks.rank, shapes=self.engine.shapes)
        if self.ranks.is_main:
            state = {
                "format": checkpoint.FORMAT,
                "step": self.step,
                "updates": self.engine.updates,
                "optimizer": self.config.train.optimizer,
                "data": self.loader.state_dict(),
                "meter": self.meter.state_dict(),
                "history": self.history.to_json(),
            }
            written.append(checkpoint.write_trainer_state(folder, state))
            if self.guidance_network is not None:
                written.append(self.guidance_network.save(folder))
        return written


def execution(train: TrainConfig, device: torch.device) -> dict[str, Any]:
    """How the network runs, as `TransitionTransformer.execute` takes it. Raises ConfigError for an attention that this device has not."""
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    try:
        choose_backend(AttentionRequirements(device.type, dtype, backward=True, capability=capability), train.attention)
    except ValueError as error:
        raise ConfigError(f"train.attention: {error}") from error
    named = {"none": 0, "full": 1}
    every = named[train.checkpointing] if isinstance(train.checkpointing, str) else train.checkpointing
    return {"attention": {dtype: train.attention}, "checkpoint_every": every, "compile": train.compile}


def learning_rate(step: int, train: TrainConfig) -> float:
    """The rate of the update that leads from `step` to `step + 1`: a function of the step alone, whatever the number of ranks."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _introduction(
    config: Config, ranks: Ranks, trainer: Trainer, *, found: checkpoint.Checkpoint | None, changes: list[str]
) -> Iterator[str]:
    """What a log should say before the first step."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads each"
    processes, packs = _processes(ranks.size), config.plan.at(trainer.step).packs_per_step
    step = f"{packs} packs of {config.plan.tokens_per_pack} tokens a step"
    settings = f"ZeRO-{config.train.zero} · {config.train.precision} · {step}"
    yield f"{trainer.parameters / 1e6:.2f}M parameters · {processes} on {device} · {settings}"
    if empty := -packs % ranks.size:
        waiting = f"up to {empty / (packs + empty):.0%} of their time may be waiting"
        yield f"warning: {packs} packs a step do not divide among {processes}: {waiting}; `tim plan --ranks {ranks.size}` says how much"
    if found is None and trainer.history.init is not None:
        yield f"beginning with {trainer.history.init}"
        yield from other_surroundings(config)
    if found is not None:
        for passed_over in found.passed_over:
            yield f"passed over: {passed_over}"
        before = found.metadata.world_size
        others = "" if before == ranks.size else f", which {_processes(before)} wrote: samples and draws of a step stay the same"
        yield f"continuing from {found.folder}{others}"
        for change in changes:
            yield f"changed since: {change}"


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"
