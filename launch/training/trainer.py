"""The trainer: takes steps, guards them, saves and resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.finetuned import base
from launch.checkpoints.history import History
from launch.checkpoints.resuming import restore_plan, trainer_state
from launch.checkpoints.saving.background import BackgroundSaver, Part
from launch.config.schema import Config, digest
from launch.distributed.heartbeat import HEARTBEAT
from launch.distributed.ranks import Ranks
from launch.engine.learning_rate import learning_rate
from launch.finetuning.lora import draw_dropout
from launch.finetuning.trainable import limit_training
from launch.guards import bad_samples
from launch.guards.loss_spikes import SpikeDetector
from launch.logs.progress_line import validation_in_words
from launch.training import guidance_network
from launch.training.build import Parts, make_network
from launch.training.guidance_network import GuidanceNetwork
from launch.training.measuring.image_facts import ImageFacts
from launch.training.measuring.usage import Usage
from launch.training.metrics import Meter, StepMeasure
from launch.training.step_losses import StepLosses, Sums
from pipeline.bounded_counter import listed
from pipeline.loading.loader import Batch, LoadedStep
from tim import TransitionTransformer
from tim.objective import Guide, Losses
from tim.packed import Condition


class Requests(NamedTuple):
    """What signals ask of a run: to stop, or to save and go on."""

    stop: bool
    save: bool


class Trainer:
    """Runs steps, saves checkpoints and resumes. Every public method must be called by all ranks."""

    def __init__(self, config: Config, parts: Parts, *, ranks: Ranks) -> None:
        self.config = config
        self.parts = parts
        self.ranks = ranks
        self.history = parts.history
        self.guidance_network: GuidanceNetwork | None = None  # created at the first step with guidance
        self.saver: BackgroundSaver | None = None
        self.meter = Meter()
        self.usage = Usage(ranks, precision=config.train.precision)
        self.spikes = SpikeDetector()
        self.step = 0
        self.log: Callable[[str], None] = lambda line: None
        self._skipped = 0  # consecutive steps
        self._first_of_stages = {stage.step for stage in config.plan.schedule}
        self._has_warned_of_validation = False
        self._waited = 0.0  # seconds for the data of the step in hand
        params, aligned = cast(TransitionTransformer, parts.engine.module).params, config.objective.alignment is not None
        self._facts = ImageFacts(parts.objective, params=params, alignment=aligned, trained=parts.trained_share)
        self._steps: Iterator[LoadedStep] | None = None

    def agree(self, *, stop: bool, save: bool = False) -> Requests:
        """What any rank asks for. Also passes on the state of the save in progress."""
        votes = self.saver.votes() if self.saver else ()
        asked = self.ranks.sum(torch.tensor([stop, save, *votes], dtype=torch.float32)).tolist()
        if self.saver:
            self.saver.receive(asked[2:])
        return Requests(stop=asked[0] > 0, save=asked[1] > 0)

    def take_step(self) -> StepMeasure:
        """Update the weights once. Samples that make the loss non-finite are left out."""
        # data
        HEARTBEAT.section("data", step=self.step + 1)
        if self._steps is None:
            self._steps = iter(self.parts.loader)
            self.meter.pause()
        start = time.monotonic()
        loaded = next(self._steps)
        self._waited = time.monotonic() - start
        self._refresh_guidance_network()
        draw_dropout(self.parts.engine.module, seed=self.config.seed, step=self.step)

        # forward and backward, pack by pack
        clock = self.meter.clock
        with clock.measure("compute"):
            sums = self._accumulate(loaded.batches, count=loaded.images)
            if sums.all_suspects:
                sums = self._leave_out_bad_samples(loaded, sums)
        clock.seconds["data"] += sums.waited
        if loaded.images and not any(sums.raw_images):
            self.ranks.fail(
                RuntimeError(f"none of the {loaded.images} images of step {self.step + 1} could be used: see the warnings above")
            )

        # update
        lr = learning_rate(self.step, self.config.train)
        engine, ema = self.parts.engine, self.parts.ema
        with clock.measure("optimizer"):
            result = engine.step(lr=lr)
            ema.update(engine.fragments(), updates=self.step)
        self.step += 1
        self._count_skipped(applied=result.applied, ids=loaded.ids)

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
            binned=sums.binned,
            flops=sums.flops,
        )
        self.meter.add(measure)
        self.meter.count("repeated_derivatives", sums.repeated)

        # loss spike
        if self.step - 1 in self._first_of_stages:
            self.spikes.restart()  # a stage has other shares, sizes and losses
        spike = self.spikes.add(sums.raw, sums.raw_images)
        if spike is not None:
            self._handle_spike(spike)
        return measure

    def _accumulate(self, batches: Sequence[Batch], *, count: int) -> Sums:
        """Forward and backward passes of this rank's packs. count: images planned in the step on all ranks."""
        losses = StepLosses(self._facts)
        for batch in batches:
            HEARTBEAT.section("compute", keys=batch.ids)
            condition = self.parts.frozen.condition(batch)
            of_pack = self._losses(batch, condition)
            self.parts.engine.accumulate(of_pack.loss, count=count)
            losses.add(batch, of_pack, condition)
        return losses.sums(self.ranks, waited=self._waited)

    def _losses(self, batch: Batch, condition: Condition | None = None) -> Losses:
        """Forward pass of one pack. condition: of its images, if it is at hand."""
        parts = self.parts
        return parts.objective(
            parts.engine,
            parts.frozen.latents(batch),
            parts.frozen.condition(batch) if condition is None else condition,
            noise=batch.noise,
            kinds=batch.kinds,
            uniforms=batch.uniforms,
            weights=batch.weights,
            masks=batch.masks,
            derivative_network=parts.engine.module,
            guide=self._guide(len(batch.ids)),
            teacher=parts.frozen.teacher_tokens(batch),
        )

    def _leave_out_bad_samples(self, loaded: LoadedStep, sums: Sums) -> Sums:
        """Take the step again without the samples that make the loss non-finite by themselves.

        Without such samples, or if all are, the network is to blame: the update will be skipped, because the gradient is not finite.
        Raises RuntimeError if too many samples are bad.
        """
        if sums.all_suspects == sum(sums.raw_images):
            return sums
        patch_size = self.config.network.params.patch_size
        bad = bad_samples.find(loaded.batches, sums.suspects, loss_of=self._losses, patch_size=patch_size, ranks=self.ranks)
        found = [each for of_rank in self.ranks.gather(bad) for each in of_rank]
        if not found:
            return sums
        self.parts.engine.discard()
        run_dir, step = self.config.run_dir, self.step + 1
        assert run_dir is not None
        self.ranks.run_on_rank0(lambda: bad_samples.record(run_dir, found, step=step))
        ids = listed([each.id for each in found], count=len(found))
        self.log(f"warning: left out of step {step}: {ids}: {found[0].reason}; see {bad_samples.FILE}")
        self.meter.count("bad_samples", len(found))
        self.ranks.run_on_all_ranks(lambda: self.parts.loader.count_bad(len(bad)))
        positions = [{each.position for each in bad if each.batch == number} for number in range(len(loaded.batches))]
        batches = [bad_samples.blank(*each, patch_size=patch_size) for each in zip(loaded.batches, positions, strict=True)]
        return self._accumulate(batches, count=loaded.images)

    def _count_skipped(self, *, applied: bool, ids: Sequence[str]) -> None:
        """Raises RuntimeError after `train.max_skips` skipped steps in a row."""
        self._skipped = 0 if applied else self._skipped + 1
        if applied:
            return
        self.log(f"warning: step {self.step} skipped, its gradient is not finite; its samples: {listed(ids, count=len(ids))}")
        if self._skipped == self.config.train.max_skips:
            remedy = "lower train.lr, use train.precision=fp32, or go back to an earlier checkpoint"
            self.ranks.fail(RuntimeError(f"the gradient was not finite in the {self._skipped} steps up to {self.step}: {remedy}"))

    def _handle_spike(self, spike: str) -> None:
        """Warn, or go back to the weights of the last checkpoint. The plan goes on: the steps of the spike are not taken again.

        Raises RuntimeError after `train.max_rollbacks`.
        """
        self.meter.count("loss_spikes", 1)
        run_dir, train = self.config.run_dir, self.config.train
        assert run_dir is not None
        if train.spike == "warn":
            self.log(f"warning: loss spike at step {self.step}: {spike}")
            self.spikes.restart()
            return
        if self.saver:
            self.saver.wait()
        found = self.ranks.run_on_rank0(lambda: checkpoint.newest(run_dir))
        if found is None:
            self.log(f"warning: loss spike at step {self.step}: {spike}; there is no checkpoint to go back to")
            self.spikes.restart()
            return
        if self.meter.total("rollbacks") == train.max_rollbacks:
            remedy = "lower train.lr, or raise train.max_rollbacks"
            self.ranks.fail(RuntimeError(f"loss spike at step {self.step} after {train.max_rollbacks} rollbacks: {spike}: {remedy}"))
        state = self.ranks.run_on_all_ranks(lambda: self._trainer_state(found))
        self._load_weights(found, state)
        self.meter.count("rollbacks", 1)
        back = f"went back to the weights of step {found.metadata.step}; training goes on with step {self.step + 1}"
        self.log(f"warning: loss spike at step {self.step}: {spike}; {back}")

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
            limit_training(network, self.config)
        return GuidanceNetwork(network, ranks=self.ranks, frozen=self.parts.engine.frozen())

    def _guide(self, images: int) -> Guide | None:
        """Guidance for the targets of a pack of `images` images; None before guidance starts."""
        guidance = self.config.objective.guidance
        if guidance is None or self.guidance_network is None:
            return None
        unconditional = self.parts.frozen.no_condition(images)
        return Guide(self.guidance_network, unconditional, w_gt=guidance.w_gt, w_cond=guidance.w_cond, interval=guidance.interval)

    def row(self, measure: StepMeasure) -> dict[str, Any]:
        """Metrics since the last row. measure: of the last step."""
        if self.usage.measure_rate(trained=self.meter.seconds):
            self.meter.pause()
        row = self.meter.row(self.step, measure)
        return {**row, **self.usage.columns(row["flops_per_second"])}

    def is_validation_due(self, *, last: bool) -> bool:
        """Whether this step is validated. last: whether the run ends with it."""
        validation = self.parts.validation
        return validation is not None and validation.is_due(self.step, last=last)

    def validate(self, *, last: bool, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Validation losses for the metrics; {} if no validation is due, or a signal stopped it.

        last: whether the run ends with this step; stopping: whether a signal asks this rank to stop.
        """
        validation = self.parts.validation
        if validation is None or not self.is_validation_due(last=last):
            return {}
        with self.meter.clock.measure("validation"):
            columns = validation.measure(self.step, stopping=stopping)
        self.meter.pause()
        if columns and columns["validation_images"]:
            self.log(f"step {self.step} · {validation_in_words(columns)} · {columns['validation_images']} images")
        elif columns and not self._has_warned_of_validation:
            self._has_warned_of_validation = True
            self.log(f"warning: step {self.step} has no validation loss: none of its images can be read, see the warnings above")
        return columns

    def save(self, saver: BackgroundSaver) -> None:
        """Start to write a checkpoint of this step."""
        HEARTBEAT.section("save")
        metadata = checkpoint.CheckpointMetadata(step=self.step, world_size=self.ranks.size, config_hash=digest(self.config))
        with self.meter.clock.measure("save"):
            saver.start(metadata, self._part())
        self.meter.pause()

    def resume(self, found: checkpoint.Checkpoint, *, recorded: History, replan: bool) -> list[str]:
        """Resume from a checkpoint of any number of ranks. Returns log lines about its plan (`launch.checkpoints.resuming.restore_plan`).

        Raises ValueError if its network, optimizer or plan differs.
        """
        state, self.history, notes = self.ranks.run_on_all_ranks(lambda: self._restore_state(found, recorded=recorded, replan=replan))
        notes += self._load_weights(found, state)
        self.meter.load_state_dict(state["meter"])
        self.meter.restarts += 1
        if "spikes" in state:  # not in older checkpoints
            self.spikes.load_state_dict(state["spikes"])
        self.step = found.metadata.step
        return notes

    def _load_weights(self, found: checkpoint.Checkpoint, state: Mapping[str, Any]) -> list[str]:
        """Load weights, moments and averages of a checkpoint with the trainer's `state`. Returns log lines."""
        self.guidance_network = None  # first, so that no two copies are held; without a saved one the next step makes it
        self.parts.engine.load(found.pieces, updates=state["updates"])
        notes = self.parts.ema.load(found.pieces, self.parts.engine.fragments(), saved=state.get("ema"))
        if (found.folder / guidance_network.FILE).is_file():
            self.guidance_network = self._new_guidance_network()
            self.guidance_network.load(found.folder)
        return notes

    def _restore_state(self, found: checkpoint.Checkpoint, *, recorded: History, replan: bool) -> tuple[dict[str, Any], History, list[str]]:
        """Restore the plan of a checkpoint. Returns its trainer state, the run's history, and log lines."""
        state = self._trainer_state(found)
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

    def _trainer_state(self, found: checkpoint.Checkpoint) -> dict[str, Any]:
        return trainer_state(found, config=self.config, shapes=self.parts.engine.shapes, base=self.parts.base)

    def _part(self) -> Part:
        """This rank's part of a checkpoint."""
        engine = self.parts.engine
        part = Part(engine.shapes, {"weights": engine.fragments(), **self.parts.ema.pieces(), **engine.moments()})
        if not self.ranks.is_main:
            return part
        state = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "updates": engine.updates,
            "ema": list(self.parts.ema.decays),
            "optimizer": self.config.train.optimizer,
            "data": self.parts.loader.state_dict(),
            "meter": self.meter.state_dict(),
            "spikes": self.spikes.state_dict(),
            "history": self.history.to_json(),
            base.KEY: None if self.parts.base is None else self.parts.base.to_json(),
        }
        replica = {} if self.guidance_network is None else {guidance_network.FILE: self.guidance_network.state_dict()}
        return part._replace(texts={checkpoint.TRAINER_STATE: json.dumps(state, indent=1)}, tensors=replica)
