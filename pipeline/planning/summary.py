"""What a plan will do, before a device is rented: fill, balance over ranks, epochs, and the samples of each step. No image is read."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

from pipeline.packing.rank_assignment import assign_to_ranks, step_makespan
from pipeline.planning.planner import Planner, Step
from pipeline.progress import Progress, no_progress


def plan_summary(planner: Planner, *, steps: int, ranks: int, progress: Progress = no_progress) -> dict[str, Any]:
    """Plan `steps` steps ahead and say what they are like on `ranks` ranks. The planner is left where it was.

    `utilisation` is the share of device time used if ranks wait for each other once a step (ZeRO-1): Σ cost / (ranks · Σ over steps of the
    dearest rank's cost); `utilisation_lockstep` if they wait in every pack (ZeRO-2 and 3). `groups_apart` is the number of parts, of the
    `groups` of shards, that ranks side by side read: each reads one. `fill` is the share of token room used, `added_packs` how many more
    packs each step has because `ranks` does not divide them, `smaller_than_a_step` says that steps repeat the corpus. `corpora` says of
    each what is used and left out of it and what of it is planned, `schedule` what changes at which step. `samples_per_second` is of
    planning and dealing. The rest are totals, and per step its `keys` (of the corpus) and `ids` in planned order; `packs_per_step` is that
    of the first.

    Raises ValueError for impossible arguments.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} is not a number of steps to plan, give 1 or more")
    start = planner.state_dict()
    began = time.perf_counter()
    planned: list[Step] = []
    waited = {False: 0.0, True: 0.0}
    for done in range(steps):
        planned.append(planner.next_step())
        for lockstep in waited:
            waited[lockstep] += step_makespan(assign_to_ranks(planned[-1], ranks=ranks, lockstep=lockstep), lockstep=lockstep)
        progress("planning", done + 1, steps)
    seconds = time.perf_counter() - began
    planner.load_state_dict(start)
    total = sum(step.cost for step in planned)
    images, counts = sum(step.images for step in planned), planner.sample_counts
    of_corpus = Counter(corpus for step in planned for pack in step.packs for corpus in pack.corpora)
    packs_per_step = len(planned[0].packs)
    return {
        "plan_hash": planner.plan_hash,
        "ranks": ranks,
        "stride": planner.stride,
        "packs_per_step": packs_per_step,
        "tokens_per_pack": planner.plan.tokens_per_pack,
        "width": planner.width,
        "gamma": planner.plan.gamma,
        "cost_factors": dict(zip(("diffusion", "consistency", "transition"), planner.plan.cost_factors, strict=True)),
        "added_packs": -packs_per_step % ranks,
        "groups": planner.plan.groups,
        "groups_apart": math.gcd(planner.plan.groups, ranks),
        "fill": sum(step.fill for step in planned) / steps,
        "utilisation": total / (ranks * waited[False]),
        "utilisation_lockstep": total / (ranks * waited[True]),
        "samples": images,
        "samples_per_step": images / steps,
        "tokens": sum(step.tokens for step in planned),
        "epochs": images / counts["samples"],
        "samples_per_second": images / seconds,
        "smaller_than_a_step": counts["samples"] * steps < images,
        "account": counts,
        "left_out": counts["left_out"],
        "corpora": [
            {**corpus, "planned": of_corpus[number], "share": of_corpus[number] / images, "epochs": of_corpus[number] / corpus["samples"]}
            for number, corpus in enumerate(counts["corpora"])
        ],
        "schedule": planner.stages,
        "steps": [
            {
                "index": step.index,
                "packs": len(step.packs),
                "images": step.images,
                "tokens": step.tokens,
                "fill": step.fill,
                "keys": [key for pack in step.packs for key in pack.keys],
                "ids": list(step.ids),
            }
            for step in planned
        ],
    }
