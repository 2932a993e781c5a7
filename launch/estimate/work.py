"""Operations of the planned steps of a run: from the plan of its corpus if there is one, else from the limits in its configuration.

A run's schedule has stages; a few steps of each are planned, and stand for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.config.schema import Config
from launch.training.planning import make_planner
from pipeline.cost import DIFFUSION
from pipeline.packing.rank_assignment import assign_to_ranks, step_makespan
from pipeline.planned_steps import Step
from tim.flops import Lengths, forward_flops, step_flops

PLANNED = 8  # steps of a stage that are planned


@dataclass(frozen=True, slots=True)
class PlannedWork:
    """Work of a run. flops: of all its steps; utilisation: share of device time that ranks use; images, tokens: of an average step;
    tokens_in_pack, images_in_pack: of the most expensive pack; text_share: caption tokens per image token; source: of these numbers."""

    flops: float
    utilisation: float
    images: float
    tokens: float
    tokens_in_pack: int
    images_in_pack: float
    text_share: float
    source: str


@dataclass(frozen=True, slots=True)
class _PackWork:
    tokens: Sequence[int]
    moving: Sequence[int]


def planned_work(config: Config, *, ranks: int, trained_share: float, checkpointed_share: float) -> PlannedWork:
    """Work of all steps. trained_share: of the matrices' gradients that are computed; checkpointed_share: of blocks computed twice.

    Raises ValueError if a corpus cannot be planned.
    """
    stages = _stages(config)
    flops = seconds = images = tokens = 0.0
    tokens_in_pack, images_in_pack = 0, 0.0
    for stage, steps in stages:
        packs, utilisation, number = _of_plan(stage, ranks=ranks) if config.corpus else _of_limits(stage, ranks=ranks)
        of_step = sum(_flops(stage, pack, trained=trained_share, twice=checkpointed_share) for pack in packs) / number
        flops += steps * of_step
        seconds += steps * of_step / utilisation
        images += steps * sum(len(pack.tokens) for pack in packs) / number
        tokens += steps * sum(sum(pack.tokens) for pack in packs) / number
        tokens_in_pack = max(tokens_in_pack, *(sum(pack.tokens) for pack in packs))
        images_in_pack = max(images_in_pack, *(len(pack.tokens) for pack in packs))
    total = config.train.steps
    text = config.text.max_tokens if config.condition == "text" else 0
    source = f"the plan of {', '.join(entry.path for entry in config.corpus)}" if config.corpus else "plan.* limits: full packs, no corpus"
    return PlannedWork(
        flops=flops,
        utilisation=flops / seconds,
        images=images / total,
        tokens=tokens / total,
        tokens_in_pack=tokens_in_pack,
        images_in_pack=images_in_pack,
        text_share=text * images / tokens,
        source=source,
    )


def _stages(config: Config) -> list[tuple[Config, int]]:
    """The configuration of each stage of the schedule, without one, and its number of steps."""
    starts = [0, *(stage.step for stage in config.plan.schedule if stage.step < config.train.steps)]
    shares = config.kind_shares(before=config.train.steps)
    stages = []
    for start, end, (diffusion, consistency) in zip(starts, [*starts[1:], config.train.steps], shares, strict=True):
        plan = config.plan.at(start).model_copy(update={"schedule": ()})
        objective = config.objective.model_copy(update={"diffusion_share": diffusion, "consistency_share": consistency})
        weights = config.plan.weights_at(start) or {}
        corpora = tuple(
            entry.model_copy(update={"weight": weights[entry.name]}) if entry.name in weights else entry for entry in config.corpus
        )
        stages.append((config.model_copy(update={"plan": plan, "objective": objective, "corpus": corpora}), end - start))
    return stages


def _of_plan(config: Config, *, ranks: int) -> tuple[list[_PackWork], float, int]:
    """Packs of the first steps of a plan, the share of time that ranks use, and the number of those steps."""
    planner = make_planner(config)
    steps: list[Step] = [planner.next_step() for _ in range(min(PLANNED, config.train.steps))]
    lockstep = config.train.lockstep
    makespan = sum(step_makespan(assign_to_ranks(step, ranks=ranks, lockstep=lockstep), lockstep=lockstep) for step in steps)
    packs = []
    for step in steps:
        for pack in step.packs:
            samples = list(pack.samples)
            moving = [place for place, sample in enumerate(samples) if sample.kind != DIFFUSION]
            packs.append(_PackWork([sample.tokens for sample in samples], moving))
    return [pack for pack in packs if pack.tokens], sum(step.cost for step in steps) / (ranks * makespan), len(steps)


def _of_limits(config: Config, *, ranks: int) -> tuple[list[_PackWork], float, int]:
    """Full packs of the largest images."""
    plan = config.plan
    images = max(1, plan.tokens_per_pack // plan.max_tokens)
    moving = 1 - config.objective.diffusion_share
    packs, carried = [], 0.0
    for _ in range(plan.packs_per_step):
        carried += moving * images
        packs.append(_PackWork([plan.max_tokens] * images, range(min(images, round(carried)))))
        carried -= len(packs[-1].moving)
    rounds = -(-plan.packs_per_step // ranks)
    return packs, plan.packs_per_step / (rounds * ranks), 1


def _flops(config: Config, pack: _PackWork, *, trained: float, twice: float) -> float:
    """Operations of a pack in a step, recomputation and guidance included."""
    params: dict[str, Any] = config.network.params.model_dump(exclude_none=True)
    text = [config.text.max_tokens] * len(pack.tokens) if config.condition == "text" else None
    lengths, alignment = Lengths(list(pack.tokens), text), config.objective.alignment is not None
    step = step_flops(params, lengths, moving=list(pack.moving), alignment=alignment, trained=trained)
    forward, guided = forward_flops(params, lengths, alignment=alignment), 0.0
    if (guidance := config.objective.guidance) is not None:
        guided = 2 * forward * (guidance.interval[1] - guidance.interval[0])
    return step + twice * forward + guided
