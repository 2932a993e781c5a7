"""Cost of what a training step does besides gradients and update (`tim bench step`): averages, guards, logging, heartbeat, saves.

One trainer takes the same step again and again, on one rank under ZeRO 1. The variants take turns, in rotating order, and each is divided
by the bare step of its turn. The bare step neither reads losses nor averages weights nor writes what it is doing. Logging reads losses and
writes a row to metrics.jsonl and TensorBoard in every step, ten times as often as by default; its calls are also timed by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from launch.benchmarks.logging_cost import LoggedTrainer, tensorboard_listener
from launch.benchmarks.network import FEATURES, STRIDE, Grid, synchronise
from launch.checkpoints.saving.background import BackgroundSaver
from launch.checkpoints.saving.follow_ups import FollowUps
from launch.config.load import load_config
from launch.config.run_sections import CheckpointConfig
from launch.config.schema import Config
from launch.distributed.heartbeat import HEARTBEAT
from launch.distributed.ranks import Ranks, process_group
from launch.distributed.self_watch import watched
from launch.engine.ema import ShardedEMA
from launch.guards.loss_spikes import SpikeDetector
from launch.training.build import Parts, build
from launch.training.metrics import Meter, MetricsWriter, StepMeasure
from launch.training.planning import make_planner
from launch.training.step_losses import Sums
from launch.training.trainer import Trainer
from pipeline.cost import KIND_NAMES
from pipeline.loading.loader import Batch, Loader
from pipeline.progress import Progress

Data = dict[str, Any]
BARE, AGAIN, ALL = "bare", "bare again", "all of these"


def bench_overheads(grids: Sequence[Grid], *, width: int, depth: int, precision: str, turns: int, progress: Progress) -> Data:
    """Time a training step on images of these grids with and without each of its guards.

    `over_bare` divides the fastest turns; quartiles are of the ratios by turn. `cpu_over_bare` divides seconds of processor time, which
    other load changes less.
    A save is timed from its start until it is published, and compared with as many bare steps; `at_default` spreads what it adds over
    the default `checkpoint.every`.
    """
    with TemporaryDirectory() as folder, process_group() as ranks, ExitStack() as cleanup:
        config = _config(Path(folder), grids, width=width, depth=depth, precision=precision)
        parts = _repeating(build(config, make_planner(config), ranks=ranks, cleanup=cleanup))
        loaded = next(iter(parts.loader))
        variants, save, logged = _variants(config, parts, ranks=ranks, cleanup=cleanup)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        added, steps = [], []
        for turn in range(turns + 1):
            names = list(variants)
            first = turn % len(names)
            for position, name in enumerate(names[first:] + names[:first]):
                context, step = variants[name]
                with context():
                    times[name].append(_seconds(step))
                progress("measuring", turn * (len(names) + 1) + position + 1, (turns + 1) * (len(names) + 1))
            (seconds, _), taken = _seconds_of_save(save)
            added.append(seconds / times[BARE][-1][0] - taken)
            steps.append(taken)
        logging = logged.costs([cpu for _, cpu in times[BARE]])
        of_step = {"images": loaded.images, "tokens": loaded.tokens, "turns": turns, **_ratios(times)}
        return {**of_step, "logging": logging, "save": _of_saves(added, steps)}


class _Unguarded(Trainer):
    """Neither reads losses nor looks for bad samples."""

    def _accumulate(self, batches: Sequence[Batch], *, count: int) -> Sums:
        for batch in batches:
            self.parts.engine.accumulate(self._losses(batch).loss, count=count)
        ones = (1,) * len(KIND_NAMES)
        return Sums(failed=0, repeated=0, raw=ones, raw_images=ones, alignment=0.0, suspects=[], all_suspects=0)


class _NoSpikes(SpikeDetector):
    def add(self, raw: Sequence[float], images: Sequence[int]) -> str | None:
        return None


class _NoMeter(Meter):
    def add(self, measure: StepMeasure) -> None:
        pass


class _Repeated:
    """A loader that gives its first step again and again."""

    def __init__(self, loader: Loader) -> None:
        self._step = next(iter(loader))
        self.state_dict = loader.state_dict

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._step


Variants = Mapping[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], object]]]


def _variants(config: Config, parts: Parts, *, ranks: Ranks, cleanup: ExitStack) -> tuple[Variants, Callable[[], int], LoggedTrainer]:
    """Steps by name, each with what must be entered before; a save, which returns how many steps were taken meanwhile; and the trainer that
    logs."""
    assert config.run_dir is not None
    without = replace(parts, ema=ShardedEMA({}, decay=()))
    bare, averaging = (_Unguarded(config, some, ranks=ranks) for some in (without, parts))
    guarded, full = (Trainer(config, some, ranks=ranks) for some in (without, parts))
    writer = cleanup.enter_context(MetricsWriter(config.run_dir, step=0))
    writer.listeners.append(tensorboard_listener(config, cleanup=cleanup))
    logged = LoggedTrainer(config, without, ranks=ranks, writer=writer, cleanup=cleanup)
    bare.spikes = averaging.spikes = logged.spikes = _NoSpikes()
    bare.meter = averaging.meter = guarded.meter = _NoMeter()
    section = CheckpointConfig(keep_last=1)
    follow_ups = FollowUps(config.run_dir, section)
    saver = cleanup.enter_context(BackgroundSaver(config.run_dir, section, ranks=ranks, follow_ups=follow_ups, log=lambda line: None))
    cleanup.callback(saver.finish)
    full.saver = saver

    def guarded_step(trainer: Trainer) -> None:
        trainer.take_step()
        trainer.agree(stop=False)

    def all_of_these(trainer: Trainer) -> None:
        writer.write(trainer.row(trainer.take_step()))
        trainer.agree(stop=False)

    def save() -> int:
        averaging.save(saver)
        taken = 0
        while not saver.votes()[0] or not taken:
            bare.take_step()
            taken += 1
        saver.wait(must_succeed=True)
        averaging.step += 1  # the name of the next save
        return taken

    def heartbeat() -> AbstractContextManager[Any]:
        return _heartbeat(config)

    variants = {
        BARE: (nullcontext, bare.take_step),
        AGAIN: (nullcontext, bare.take_step),
        "average (EMA)": (nullcontext, averaging.take_step),
        "guards": (nullcontext, lambda: guarded_step(guarded)),
        "logging": (nullcontext, logged.take_and_log),
        "heartbeat": (heartbeat, bare.take_step),
        ALL: (heartbeat, lambda: all_of_these(full)),
    }
    return variants, save, logged


def _heartbeat(config: Config) -> ExitStack:
    """Write what this rank is doing, and watch for hangs."""
    assert config.run_dir is not None
    entered = ExitStack()
    entered.enter_context(HEARTBEAT.opened(config.run_dir, rank=0))
    entered.enter_context(watched(config.run_dir, limits=config.train.hang_limits))
    return entered


def _config(folder: Path, grids: Sequence[Grid], *, width: int, depth: int, precision: str) -> Config:
    """Prepare noise images of these grids with captions. Returns the configuration of a run on them."""
    images, generator = folder / "images", np.random.default_rng(0)
    images.mkdir()
    for number, (height, wide) in enumerate(grids):
        noise = generator.integers(0, 256, (height * STRIDE, wide * STRIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{number}.jpg")
        (images / f"{number}.txt").write_text(f"noise number {number}")
    prepare([str(images)], out=folder / "corpus", config=PrepareConfig())
    tokens = [height * wide for height, wide in grids]
    network = {"patch_size": STRIDE, "depth": depth, "hidden_size": width, "num_heads": width // 64, "cap_feat_dim": FEATURES}
    overrides = {
        "corpus": folder / "corpus",
        "run_dir": folder / "run",
        "plan": f"{{max_tokens: {max(tokens)}, tokens_per_pack: {sum(tokens)}, packs_per_step: 1}}",
        "network.params": f"{{{', '.join(f'{key}: {value}' for key, value in network.items())}}}",
        "train.steps": 1_000_000,
        "train.precision": precision,
        "loader.workers": 0,
    }
    (folder / "run").mkdir()
    return load_config(None, overrides=[f"{key}={value}" for key, value in overrides.items()])


def _repeating(parts: Parts) -> Parts:
    return replace(parts, loader=cast(Loader, _Repeated(parts.loader)))


def _seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    synchronise()
    start, start_of_cpu = time.perf_counter(), time.process_time()
    action()
    synchronise()
    return time.perf_counter() - start, time.process_time() - start_of_cpu


def _seconds_of_save(save: Callable[[], int]) -> tuple[tuple[float, float], int]:
    taken = 0

    def action() -> None:
        nonlocal taken
        taken = save()

    return _seconds(action), taken


def _ratios(times: Mapping[str, Sequence[tuple[float, float]]]) -> Data:
    """The fastest turn of each variant over that of the bare step, and quartiles of the ratios by turn. The first turn warms up."""
    wall, cpu = (np.array([[seconds[kind] for seconds in of[1:]] for of in times.values()]) for kind in (0, 1))
    ratios, of_cpu = ((values.min(axis=1) / values[0].min()).tolist() for values in (wall, cpu))
    low, high = np.quantile(wall / wall[0], (0.25, 0.75), axis=1).tolist()
    rows = [(name, *row) for name, *row in zip(times, ratios, low, high, of_cpu, strict=True) if name != BARE]
    return {
        "seconds_bare": float(wall[0].min()),
        "over_bare": {name: ratio for name, ratio, *_ in rows},
        "over_bare_quartiles": {name: f"{below:.3f} to {above:.3f}" for name, _, below, above, _ in rows},
        "cpu_over_bare": {name: ratio for name, *_, ratio in rows},
    }


def _of_saves(added: Sequence[float], steps: Sequence[int]) -> Data:
    every = CheckpointConfig().every
    low, median, high = np.quantile(added[1:], (0.25, 0.5, 0.75)).tolist()
    return {
        "steps_meanwhile": float(np.median(steps[1:])),
        "adds_steps": median,
        "adds_steps_quartiles": f"{low:.3f} to {high:.3f}",
        "over_bare_at_default": 1 + median / every,
    }
