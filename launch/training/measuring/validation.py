"""Loss on images that are not trained on, for the weights and for their average.

Every image is measured once for each kind that is trained (r = t, r = 0, r < t), at times and noise that depend on its id alone. Losses
are the unweighted errors that `loss` in the metrics is the mean of, without guidance in the target. Per-image errors are summed in float64,
so that the means are the same for any number of ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from launch.config.data_sections import ValidationConfig
from launch.distributed.heartbeat import HEARTBEAT
from launch.distributed.ranks import Ranks
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.training.frozen_models import FrozenModels
from launch.training.measuring.bins import SIZES, mean_or_none, size_bins, size_columns
from pipeline.cost import DIFFUSION, KIND_NAMES
from pipeline.loading.loader import Batch, Loader
from pipeline.planning.validation_plan import ValidationPlan
from tim.objective import TransitionObjective

Columns = dict[str, float | None]

_LEAST_SHARE = 1e-9  # of a kind; less is a rounding error


class Stage(NamedTuple):
    """What a validation needs to know of the plan at a step. shares: of images by kind; max_tokens: of an image."""

    max_tokens: int
    shares: tuple[float, ...]


class Validation:
    """The validation of a run. Every method but `is_due` must be called by all ranks.

    Args:
        section: of the configuration.
        stage_at: the plan's stage at a step.
        plan_at: the images at a step; those of one stage are opened once.
        make_loader: opens a loader of the images.
    """

    def __init__(
        self,
        section: ValidationConfig,
        *,
        stage_at: Callable[[int], Stage],
        plan_at: Callable[[int], ValidationPlan],
        make_loader: Callable[[ValidationPlan], Loader],
        frozen: FrozenModels,
        objective: TransitionObjective,
        engine: Engine,
        ema: ShardedEMA,
        ranks: Ranks,
    ) -> None:
        self._section = section
        self._stage_at, self._plan_at, self._make_loader = stage_at, plan_at, make_loader
        self._frozen, self._engine, self._ema, self._ranks = frozen, engine, ema, ranks
        self._objective = objective
        self._without_derivative = copy.copy(objective)  # for r = t: no rank has anything to differentiate
        self._without_derivative.equal_forwards = False
        self._open: dict[int, tuple[ValidationPlan, Loader]] = {}
        self._images_at(0)

    def is_due(self, step: int, *, last: bool) -> bool:
        return last or step % self._section.every == 0

    @torch.no_grad()
    def measure(self, step: int, *, stopping: Callable[[], bool]) -> Columns:
        """Columns for the metrics of a step that has been taken.

        stopping: whether a signal asks this rank to stop, which ends the validation before the next pack, with {} as its result.
        """
        HEARTBEAT.section("validate")
        shares = self._stage_at(step - 1).shares
        plan, loader = self._images_at(step - 1)
        self._engine.module.eval()  # no dropout in adapters
        columns = self._columns(plan, loader, shares=shares, suffix="", stopping=stopping)
        if columns:
            self._engine.exchange(self._ema.average)  # an error leaves them exchanged: the other ranks could not follow back
            averaged = self._columns(plan, loader, shares=shares, suffix="_ema", stopping=stopping)
            self._engine.exchange(self._ema.average)
            columns = columns | averaged if averaged else {}
        self._engine.module.train()
        return columns

    def close(self) -> None:
        for _, loader in self._open.values():
            loader.close()

    def _images_at(self, step: int) -> tuple[ValidationPlan, Loader]:
        key = self._stage_at(step).max_tokens
        if key not in self._open:
            plan = self._ranks.run_on_all_ranks(lambda: self._plan_at(step))
            self._open[key] = plan, self._make_loader(plan)
        return self._open[key]

    def _columns(
        self, plan: ValidationPlan, loader: Loader, *, shares: tuple[float, ...], suffix: str, stopping: Callable[[], bool]
    ) -> Columns:
        """Mean losses of the present weights: of all kinds in their shares, by kind, and of all kinds by size. None without images.

        {} if any rank was `stopping`.
        """
        used = {kind: share for kind, share in enumerate(shares) if share > _LEAST_SHARE}
        summed = self._sums(plan, loader, kinds=tuple(used), stopping=stopping)
        if summed is None:
            return {}
        sums, counts = summed[:-1], summed[-1]
        images = float(counts.sum())
        mixed = np.tensordot(np.array([*used.values()]), sums, axes=1)
        columns = {
            "validation_loss": mean_or_none(float(mixed.sum()), images),
            **{f"validation_loss_{KIND_NAMES[kind]}": mean_or_none(float(row.sum()), images) for kind, row in zip(used, sums, strict=True)},
            **size_columns(mixed, counts, prefix="validation_loss_tokens"),
        }
        named = {f"{name}{suffix}": loss for name, loss in columns.items()}
        return named if suffix else {"validation_images": round(images), **named}

    def _sums(
        self, plan: ValidationPlan, loader: Loader, *, kinds: tuple[int, ...], stopping: Callable[[], bool]
    ) -> NDArray[np.float64] | None:
        """(kinds + 1, sizes) sums of errors over all ranks, then numbers of images; None if any rank was `stopping`."""
        total = np.zeros((len(kinds) + 1, SIZES))
        loader.load_state_dict({"step": 0})
        steps = iter(loader)
        for _ in range(plan.steps):
            HEARTBEAT.section("validate")
            if self._ranks.any(stopping()):
                loader.close()
                return None
            for batch in next(steps).batches:
                HEARTBEAT.section("validate", keys=batch.ids)
                total += self._of_pack(batch, kinds=kinds)
        loader.close()
        return self._ranks.sum(torch.from_numpy(total)).numpy()

    def _of_pack(self, batch: Batch, *, kinds: tuple[int, ...]) -> NDArray[np.float64]:
        """(kinds + 1, sizes) sums of errors by kind, then the number of images."""
        latents, condition = self._frozen.latents(batch), self._frozen.condition(batch)
        errors = [
            (self._without_derivative if kind == DIFFUSION else self._objective)(
                self._engine,
                latents,
                condition,
                noise=batch.noise,
                kinds=torch.full_like(batch.kinds, kind),
                uniforms=batch.uniforms,
                weights=batch.weights,
                masks=batch.masks,
                derivative_network=self._engine.module,
            ).raw
            for kind in kinds
        ]
        real = batch.weights.numpy() > 0
        cells = self._objective.patch_size**2
        sizes = size_bins([noise.shape[-2] * noise.shape[-1] // cells for noise in batch.noise])[real]
        values = [*torch.stack(errors).cpu().double().numpy()[:, real], np.ones(len(sizes))]
        return np.stack([np.bincount(sizes, weights=each, minlength=SIZES) for each in values]).astype(np.float64)
