"""Assign the packs of a step to ranks so that all ranks finish at nearly the same time.

Planned packs have nearly equal costs and are assigned unchanged if that keeps all ranks busy. If one image costs more than the average
pack, packs cannot be equal; then the step's samples are repacked for the number of ranks.

- Ranks that synchronise once per step: total costs are balanced. The rank with the expensive image gets little else.
- Ranks in lockstep, which synchronise in every pack: a micro-step takes as long as its most expensive pack. So the packs that run
  alongside an expensive image are made equally expensive, and those of the other micro-steps become lighter.

Samples, kinds and draws of a step do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.cost import Floats, Ints
from pipeline.packing.packing import NO_ROOM, assign_to_packs
from pipeline.planned_steps import Pack, Step

RankPacks = list[list[Pack]]

_EVEN_ENOUGH = 0.99  # utilisation above which planned packs are kept
_FULL = 0.95  # assumed fill of a pack of expensive images; highest measured utilisation


def assign_to_ranks(step: Step, *, ranks: int, lockstep: bool) -> RankPacks:
    """The packs of each rank, the same number for all. If `ranks` does not divide the packs, some ranks get empty packs.

    `lockstep`: ranks synchronise in every pack, not only at the end of the step. If the step has groups of shards, the groups and the ranks
    are split into gcd(groups, ranks) parts, and consecutive ranks share a part: eight ranks and four groups make four parts.

    Raises ValueError if `ranks` is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks: {ranks}, must be at least 1")
    parts = math.gcd(step.groups, ranks)
    packs = len(step.packs) // parts
    return [
        rank_packs
        for first in range(0, len(step.packs), packs)
        for rank_packs in _assign_part(
            step.packs[first : first + packs], ranks=ranks // parts, lockstep=lockstep, tokens_per_pack=step.tokens_per_pack
        )
    ]


def _assign_part(packs: Sequence[Pack], *, ranks: int, lockstep: bool, tokens_per_pack: int) -> RankPacks:
    """Assign the planned packs if that keeps the ranks busy; otherwise repack if that is better."""
    planned = _assign_sorted(packs, ranks=ranks)
    cost = sum(pack.cost for pack in packs)
    if ranks == len(packs) or cost >= _EVEN_ENOUGH * ranks * step_makespan(planned, lockstep=lockstep):
        return planned
    repacked = _repack(packs, ranks=ranks, lockstep=lockstep, tokens_per_pack=tokens_per_pack)
    return planned if repacked is None else min(planned, repacked, key=lambda rank_packs: step_makespan(rank_packs, lockstep=lockstep))


def step_makespan(rank_packs: Sequence[Sequence[Pack]], *, lockstep: bool) -> float:
    """Cost of a step: that of the most expensive rank; in lockstep, the sum of the most expensive packs of all micro-steps."""
    if lockstep:
        return sum(max(pack.cost for pack in packs) for packs in zip(*rank_packs, strict=True))
    return max(sum(pack.cost for pack in packs) for packs in rank_packs)


def _assign_sorted(packs: Sequence[Pack], *, ranks: int) -> RankPacks:
    """Assign packs by descending cost, `ranks` at a time; each time, the rank with the lowest total gets the most expensive."""
    padded = [*packs, *[Pack.empty()] * (-len(packs) % ranks)]
    by_cost = sorted(padded, key=lambda pack: -pack.cost)
    rank_packs: RankPacks = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for start in range(0, len(by_cost), ranks):
        by_total = sorted(range(ranks), key=lambda rank: totals[rank])
        for pack, rank in zip(by_cost[start : start + ranks], by_total, strict=True):
            rank_packs[rank].append(pack)
            totals[rank] += pack.cost
    return rank_packs


def _repack(packs: Sequence[Pack], *, ranks: int, lockstep: bool, tokens_per_pack: int) -> RankPacks | None:
    """Repack the samples for `ranks` ranks; None if a sample does not fit."""
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
    repacked = table.split(assigned, packs=count, rows=rows)
    if lockstep:
        return _assign_sorted(repacked, ranks=ranks)
    return [list(repacked[first : first + micro_steps]) for first in range(0, count, micro_steps)]


def _head_starts(tokens: Ints, *, costs: Floats, ranks: int, micro_steps: int, tokens_per_pack: int) -> Floats:
    """Initial costs of `ranks · micro_steps` packs: how much cheaper each should be than the most expensive one.

    At best the images at positions 0, R, 2R, … by descending cost are the most expensive of micro-steps 0, 1, 2, …, and give their minimum
    duration. The other packs of a micro-step are made equally expensive, as far as their token limit allows; the rest is spread evenly
    over later micro-steps.
    """
    order = np.argsort(-costs, kind="stable")
    most_expensive = np.zeros(ranks * micro_steps)
    most_expensive[: len(order)] = costs[order[: len(most_expensive)]]
    full = ranks * tokens_per_pack * _FULL * np.arange(micro_steps + 1)  # tokens of 0, 1, … micro-steps
    max_pack_cost = np.diff(np.interp(full, np.cumsum(tokens[order]), np.cumsum(costs[order]))) / ranks  # of the most expensive images
    levels = np.zeros((micro_steps, ranks))
    remaining = float(costs.sum())
    for micro_step in range(micro_steps):
        even = remaining / ((micro_steps - micro_step) * ranks)
        own = most_expensive[micro_step * ranks : (micro_step + 1) * ranks]
        levels[micro_step] = np.maximum(own, max(even, min(float(own[0]), float(max_pack_cost[micro_step]))))
        remaining -= levels[micro_step].sum()
    return (levels.max() - levels).reshape(-1)
