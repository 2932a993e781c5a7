"""What a plan will do, before a device is rented: fill, balance over ranks, epochs, and the samples of each step. No picture is read."""

from __future__ import annotations

import time
from typing import Any

from pipeline.packing import deal
from pipeline.planner import Planner


def plan_summary(planner: Planner, *, steps: int, ranks: int) -> dict[str, Any]:
    """Plan `steps` steps ahead and say what they are like on `ranks` ranks. The planner is left where it was.

    `utilisation` is the share of device time used if ranks wait for each other once a step: Σ cost / (ranks · Σ over steps of the
    dearest rank's cost); `utilisation_lockstep` if they wait after every pack (ZeRO-3). `fill` is the share of token room used,
    `empty_packs` how many each step needs because `ranks` does not divide its packs, `smaller_than_a_step` says that steps repeat the
    corpus. The rest are totals, and per step its `keys` (of the corpus) and `ids` in planned order.

    Raises ValueError for impossible arguments.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} is not a number of steps to plan, give 1 or more")
    start = planner.state_dict()
    began = time.perf_counter()
    planned = [planner.next_step() for _ in range(steps)]
    seconds = time.perf_counter() - began
    planner.load_state_dict(start)

    total = once_a_step = every_pack = 0.0
    for step in planned:
        hands = deal(step.packs, ranks=ranks)
        total += sum(pack.cost for pack in step.packs)
        once_a_step += max(sum(pack.cost for pack in hand) for hand in hands)
        every_pack += sum(max(pack.cost for pack in packs) for packs in zip(*hands, strict=True))
    images, account = sum(step.images for step in planned), planner.account
    return {
        "plan_hash": planner.plan_hash,
        "ranks": ranks,
        "stride": planner.stride,
        "packs_per_step": planner.plan.packs_per_step,
        "tokens_per_pack": planner.plan.tokens_per_pack,
        "empty_packs": -planner.plan.packs_per_step % ranks,
        "fill": sum(step.fill for step in planned) / steps,
        "utilisation": total / (ranks * once_a_step),
        "utilisation_lockstep": total / (ranks * every_pack),
        "samples": images,
        "samples_per_step": images / steps,
        "tokens": sum(step.tokens for step in planned),
        "epochs": images / account["samples"],
        "samples_per_second": images / seconds,
        "smaller_than_a_step": account["samples"] * steps < images,
        "account": account,
        "left_out": account["left_out"],
        "steps": [
            {
                "index": step.index,
                "images": step.images,
                "tokens": step.tokens,
                "fill": step.fill,
                "keys": [key for pack in step.packs for key in pack.keys],
                "ids": list(step.ids),
            }
            for step in planned
        ],
    }
