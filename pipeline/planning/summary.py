"""Preview of a plan: fill, balance over ranks, epochs, and the samples of each step. Reads no image."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

from pipeline.cost import KIND_NAMES
from pipeline.packing.rank_assignment import assign_to_ranks, step_makespan
from pipeline.planning.planner import Planner, Step
from pipeline.progress import Progress, no_progress


def plan_summary(planner: Planner, *, steps: int, ranks: int, progress: Progress = no_progress) -> dict[str, Any]:
    """Plan `steps` steps for `ranks` ranks and summarise them. The planner's state does not change.

    `utilisation` is the share of device time used if ranks synchronise once per step (ZeRO-1): Σ cost / (ranks · Σ over steps of the most
    expensive rank's cost); `utilisation_lockstep` if they synchronise in every pack (ZeRO-2 and 3). `groups_apart` is gcd(groups, ranks),
    the number of parts of the shard groups that consecutive ranks read. `fill` is the used share of the token capacity, `added_packs` the
    number of empty packs per step because `ranks` does not divide the packs; with `smaller_than_a_step`, steps repeat the corpus. `corpora`
    lists used, left-out and planned samples per corpus, `schedule` the stages. `samples_per_second` measures planning and assignment. The
    rest are totals, and per step its `keys` (of the corpus) and `ids` in planned order; `packs_per_step` is that of the first step.

    Raises ValueError if `steps` or `ranks` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps}, must be at least 1")
    start = planner.state_dict()
    started = time.perf_counter()
    planned: list[Step] = []
    makespans = {False: 0.0, True: 0.0}  # by lockstep
    for done in range(steps):
        planned.append(planner.next_step())
        for lockstep in makespans:
            makespans[lockstep] += step_makespan(assign_to_ranks(planned[-1], ranks=ranks, lockstep=lockstep), lockstep=lockstep)
        progress("planning", done + 1, steps)
    seconds = time.perf_counter() - started
    planner.load_state_dict(start)
    total = sum(step.cost for step in planned)
    images, counts = sum(step.images for step in planned), planner.sample_counts
    planned_per_corpus = Counter(corpus for step in planned for pack in step.packs for corpus in pack.corpora)
    packs_per_step = len(planned[0].packs)
    return {
        "plan_hash": planner.plan_hash,
        "ranks": ranks,
        "stride": planner.stride,
        "packs_per_step": packs_per_step,
        "tokens_per_pack": planner.plan.tokens_per_pack,
        "width": planner.width,
        "gamma": planner.plan.gamma,
        "cost_factors": dict(zip(KIND_NAMES, planner.plan.cost_factors, strict=True)),
        "added_packs": -packs_per_step % ranks,
        "groups": planner.plan.groups,
        "groups_apart": math.gcd(planner.plan.groups, ranks),
        "fill": sum(step.fill for step in planned) / steps,
        "utilisation": total / (ranks * makespans[False]),
        "utilisation_lockstep": total / (ranks * makespans[True]),
        "samples": images,
        "samples_per_step": images / steps,
        "tokens": sum(step.tokens for step in planned),
        "epochs": images / counts["samples"],
        "samples_per_second": images / seconds,
        "smaller_than_a_step": counts["samples"] * steps < images,
        "account": counts,
        "left_out": counts["left_out"],
        "corpora": [
            {
                **corpus,
                "planned": planned_per_corpus[number],
                "share": planned_per_corpus[number] / images,
                "epochs": planned_per_corpus[number] / corpus["samples"],
            }
            for number, corpus in enumerate(counts["corpora"])
        ],
        "schedule": planner.stages,
        "steps": [_step_summary(step) for step in planned],
    }


def _step_summary(step: Step) -> dict[str, Any]:
    return {
        "index": step.index,
        "packs": len(step.packs),
        "images": step.images,
        "tokens": step.tokens,
        "fill": step.fill,
        "keys": [key for pack in step.packs for key in pack.keys],
        "ids": list(step.ids),
    }
