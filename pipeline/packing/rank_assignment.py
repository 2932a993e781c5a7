"""Which rank runs which packs of a step, so that no rank waits long for another.

Planned packs cost the same as far as that can be, and are dealt as they are where that keeps all ranks busy. But where one image costs
more than a pack does on average, packs cannot be equal: then the step's samples are packed anew for the ranks that there are.

- Ranks that meet once a step: what each rank costs in all is balanced. The rank with the dear image has little else.
- Ranks in lock-step, which meet in every pack: a micro-step lasts as long as its dearest pack, so the packs that run beside a dear
  image are made as dear as it is, and those of the other micro-steps are the lighter for it.

Samples, kinds and draws of a step stay what they are, whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.cost import Floats, Ints
from pipeline.packing.packing import NO_ROOM, assign_to_packs
from pipeline.steps import Pack, Step

RankPacks = list[list[Pack]]

_EVEN_ENOUGH = 0.99  # utilisation at which planned packs stay as they are
_FULL = 0.95  # how full a pack of dear images gets; measured to keep ranks busiest


def assign_to_ranks(step: Step, *, ranks: int, lockstep: bool) -> RankPacks:
    """The packs of every rank, equally many: one more each, if need be empty, where `ranks` does not divide the packs of the step.

    `lockstep` says that ranks meet in every pack, and not only at the end of the step. Where the step has groups of shards, ranks side by
    side get whole groups, or share one, as far as the numbers of both have a common divisor: eight ranks and four groups make four parts.

    Raises ValueError for an impossible number of ranks.
    """
    if ranks < 1:
        raise ValueError(f"ranks: {ranks} is not a number of ranks, give 1 or more")
    parts = math.gcd(step.groups, ranks)
    packs = len(step.packs) // parts
    return [
        hand
        for first in range(0, len(step.packs), packs)
        for hand in _assign_part(
            step.packs[first : first + packs], ranks=ranks // parts, lockstep=lockstep, tokens_per_pack=step.tokens_per_pack
        )
    ]


def _assign_part(packs: Sequence[Pack], *, ranks: int, lockstep: bool, tokens_per_pack: int) -> RankPacks:
    """As planned where that keeps the ranks busy, else packed anew, if that is better."""
    planned = _assign_sorted(packs, ranks=ranks)
    cost = sum(pack.cost for pack in packs)
    if ranks == len(packs) or cost >= _EVEN_ENOUGH * ranks * step_makespan(planned, lockstep=lockstep):
        return planned
    anew = _packed_anew(packs, ranks=ranks, lockstep=lockstep, tokens_per_pack=tokens_per_pack)
    return planned if anew is None else min(planned, anew, key=lambda rank_packs: step_makespan(rank_packs, lockstep=lockstep))


def step_makespan(rank_packs: Sequence[Sequence[Pack]], *, lockstep: bool) -> float:
    """What a step costs the dearest rank, which all others wait for; in lock-step, the sum over micro-steps of the dearest pack."""
    if lockstep:
        return sum(max(pack.cost for pack in packs) for packs in zip(*rank_packs, strict=True))
    return max(sum(pack.cost for pack in hand) for hand in rank_packs)


def _assign_sorted(packs: Sequence[Pack], *, ranks: int) -> RankPacks:
    """Packs in order of cost, `ranks` at a time; within one deal the rank with the least so far takes the dearest."""
    filled_up = [*packs, *[Pack.empty()] * (-len(packs) % ranks)]
    dearest_first = sorted(filled_up, key=lambda pack: -pack.cost)
    rank_packs: RankPacks = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for start in range(0, len(dearest_first), ranks):
        least_first = sorted(range(ranks), key=lambda rank: totals[rank])
        for pack, rank in zip(dearest_first[start : start + ranks], least_first, strict=True):
            rank_packs[rank].append(pack)
            totals[rank] += pack.cost
    return rank_packs


def _packed_anew(packs: Sequence[Pack], *, ranks: int, lockstep: bool, tokens_per_pack: int) -> RankPacks | None:
    """The samples of these packs in packs for so many ranks; None if a sample finds no room."""
    table = next(pack.table for pack in packs if pack.table is not None)
    rows = np.sort(np.concatenate([pack.rows for pack in packs]))
    tokens, costs = table.columns.tokens[rows], table.costs[rows]
    micro_steps = -(-len(packs) // ranks)
    count = ranks * micro_steps
    assigned = assign_to_packs(
        tokens,
        costs=costs,
        urgency=np.zeros_like(tokens),
        packs=count,
        tokens_per_pack=tokens_per_pack,
        packs_per_rank=1 if lockstep else micro_steps,
        head_starts=_head_starts(tokens, costs=costs, ranks=ranks, micro_steps=micro_steps, tokens_per_pack=tokens_per_pack)
        if lockstep
        else None,
    )
    if (assigned == NO_ROOM).any():
        return None
    made = table.split(assigned, packs=count, rows=rows)
    if lockstep:
        return _assign_sorted(made, ranks=ranks)
    return [list(made[first : first + micro_steps]) for first in range(0, count, micro_steps)]


def _head_starts(tokens: Ints, *, costs: Floats, ranks: int, micro_steps: int, tokens_per_pack: int) -> Floats:
    """By how much each of `ranks · micro_steps` packs should end cheaper than the dearest one.

    The images at positions 0, R, 2R, … in order of cost can at best be the dearest of micro-steps 0, 1, 2, …, which then last at least as
    long. The packs beside them are made as dear, as far as their token room allows; what remains is spread evenly over later micro-steps.
    """
    order = np.argsort(-costs, kind="stable")
    most_expensive = np.zeros(ranks * micro_steps)
    most_expensive[: len(order)] = costs[order[: len(most_expensive)]]
    full = ranks * tokens_per_pack * _FULL * np.arange(micro_steps + 1)  # tokens of so many micro-steps
    most = np.diff(np.interp(full, np.cumsum(tokens[order]), np.cumsum(costs[order]))) / ranks  # cost of a pack full of the dearest images
    levels = np.zeros((micro_steps, ranks))
    remaining = float(costs.sum())
    for micro_step in range(micro_steps):
        even = remaining / ((micro_steps - micro_step) * ranks)
        own = most_expensive[micro_step * ranks : (micro_step + 1) * ranks]
        levels[micro_step] = np.maximum(own, max(even, min(float(own[0]), float(most[micro_step]))))
        remaining -= levels[micro_step].sum()
    return (levels.max() - levels).reshape(-1)
