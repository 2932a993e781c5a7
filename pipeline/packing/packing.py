"""Assign images to packs: a limit of tokens per pack, and equal cost as the objective.

Packs with equal numbers of tokens do not take equal time, because attention is quadratic and images with r < t cost more. Images in
descending order of cost go to the cheapest pack with room for them (longest processing time first), which keeps the most expensive pack
within a few per cent of the mean. An image without room is tried again after moving one image between packs, or left to the next step.

One image can cost more than the average pack. Therefore ranks of several packs can be balanced instead, so that a light pack follows an
expensive one; and ranks can start with different costs, so that they end with different totals.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from pipeline.cost import Floats, Ints

NO_ROOM = -1
_PARTNERS = 8  # number of cheapest packs to swap with
_ROUNDS_PER_PACK = 4
_EVEN_ENOUGH = 0.01  # allowed excess of the most expensive pack over the mean
_WORTH_A_SWAP = 0.001  # minimum gain, as a share of the most expensive pack's cost


def assign_to_packs(
    tokens: Ints,
    *,
    costs: Floats,
    urgency: Ints,
    packs: int,
    tokens_per_pack: int,
    packs_per_rank: int = 1,
    head_starts: Floats | None = None,
) -> Ints:
    """The pack of each image, (n,); `NO_ROOM` if it does not fit.

    Args:
        tokens: (n,) tokens of each image.
        costs: (n,) cost of each image, by which ranks are balanced.
        urgency: (n,) images with higher urgency are placed first, regardless of cost.
        packs: number of packs.
        tokens_per_pack: the limit of every pack.
        packs_per_rank: number of consecutive packs per rank; by default packs are balanced individually.
        head_starts: (ranks,) initial cost of each rank.
    """
    ranks = packs // packs_per_rank
    rooms = [[tokens_per_pack] * packs_per_rank for _ in range(ranks)]
    # Two heaps: ranks by cost, then number; and ranks that were too full for an image, the one with most room first.
    open_ranks = (
        [(0.0, rank) for rank in range(ranks)] if head_starts is None else list(zip(head_starts.tolist(), range(ranks), strict=True))
    )
    heapq.heapify(open_ranks)
    too_full: list[tuple[int, float, int]] = []
    assigned = np.full(len(tokens), NO_ROOM, dtype=np.int64)
    without_room: list[int] = []
    order = np.lexsort((-costs, -urgency))
    for image, needed, cost in zip(order.tolist(), tokens[order].tolist(), costs[order].tolist(), strict=True):
        while too_full and -too_full[0][0] >= needed:
            _, cost_so_far, rank = heapq.heappop(too_full)
            heapq.heappush(open_ranks, (cost_so_far, rank))
        while open_ranks and (room := max(rooms[open_ranks[0][1]])) < needed:
            cost_so_far, rank = heapq.heappop(open_ranks)
            heapq.heappush(too_full, (-room, cost_so_far, rank))
        if not open_ranks:
            without_room.append(image)
            continue
        cost_so_far, rank = open_ranks[0]
        heapq.heapreplace(open_ranks, (cost_so_far + cost, rank))
        slot = _tightest(rooms[rank], needed=needed)
        rooms[rank][slot] -= needed
        assigned[image] = rank * packs_per_rank + slot
    if without_room:
        _make_room(without_room, tokens=tokens, assigned=assigned, room=[room for rank in rooms for room in rank])
    return assigned


def _tightest(rooms: Sequence[int], *, needed: int) -> int:
    """Position of the smallest sufficient room."""
    return 0 if len(rooms) == 1 else min((room, slot) for slot, room in enumerate(rooms) if room >= needed)[1]


def fill_holes(tokens: Ints, *, room: Ints) -> Ints:
    """Best fit, largest image first: the pack of each image, `NO_ROOM` if it does not fit. `room` is (packs,) free tokens."""
    assigned = np.full(len(tokens), NO_ROOM, dtype=np.int64)
    holes = sorted((left, pack) for pack, left in enumerate(room.tolist()))
    for image in np.argsort(-tokens, kind="stable").tolist():
        needed = int(tokens[image])
        tightest = bisect_left(holes, (needed, 0))
        if tightest < len(holes):
            left, pack = holes.pop(tightest)
            assigned[image] = pack
            insort(holes, (left - needed, pack))
    return assigned


def even_out(assigned: Ints, *, tokens: Ints, costs: Floats, packs: int, tokens_per_pack: int) -> Ints:
    """Repeatedly move an image of the most expensive pack to another, or swap it for a cheaper one. Returns the new packs."""
    assigned = assigned.copy()
    used = np.bincount(assigned, weights=tokens, minlength=packs)
    total = np.bincount(assigned, weights=costs, minlength=packs)
    even_enough = (1 + _EVEN_ENOUGH) * total.mean()
    for _ in range(_ROUNDS_PER_PACK * packs):
        most_expensive = int(total.argmax())
        if total[most_expensive] <= even_enough:
            break
        partners = np.argsort(total, kind="stable")[: min(_PARTNERS, packs - 1)]
        is_partner = np.zeros(packs, dtype=bool)
        is_partner[partners] = True
        here, there = np.flatnonzero(assigned == most_expensive), np.flatnonzero(is_partner[assigned])
        # The last columns are moves without a swap, one for each partner.
        other = np.concatenate([assigned[there], partners])
        moved_cost = costs[here, None] - np.concatenate([costs[there], np.zeros(len(partners))])
        moved_tokens = tokens[here, None] - np.concatenate([tokens[there], np.zeros(len(partners), dtype=np.int64)])
        fits = (used[most_expensive] - moved_tokens <= tokens_per_pack) & (used[other] + moved_tokens <= tokens_per_pack)
        new_max = np.where(fits, np.maximum(total[most_expensive] - moved_cost, total[other] + moved_cost), np.inf)
        if not new_max.size or new_max.min() >= total[most_expensive] * (1 - _WORTH_A_SWAP):
            break
        row, column = np.unravel_index(new_max.argmin(), new_max.shape)
        for pack, sign in ((most_expensive, -1), (int(other[column]), 1)):
            used[pack] += sign * moved_tokens[row, column]
            total[pack] += sign * moved_cost[row, column]
        assigned[here[row]] = other[column]
        if column < len(there):
            assigned[there[column]] = most_expensive
    return assigned


def _make_room(images: Sequence[int], *, tokens: Ints, assigned: Ints, room: list[int]) -> None:
    """Place images that do not fit by moving one other image to another pack. Modifies `assigned` and `room`."""
    members: list[list[int]] = [[] for _ in room]
    for image in np.flatnonzero(assigned != NO_ROOM).tolist():
        members[assigned[image]].append(image)
    sizes: list[int] = tokens.tolist()
    too_large = sys.maxsize  # images of this size or more do not fit until another image moves
    for image in images:
        if sizes[image] >= too_large:
            continue
        move = _cheapest_move(sizes[image], sizes=sizes, members=members, room=room)
        if move is None:
            too_large = sizes[image]
            continue
        too_large = sys.maxsize
        moved, source, target = move
        if moved is not None:
            members[source].remove(moved)
            members[target].append(moved)
            room[source] += sizes[moved]
            room[target] -= sizes[moved]
            assigned[moved] = target
        members[source].append(image)
        room[source] -= sizes[image]
        assigned[image] = source


def _cheapest_move(
    needed: int, *, sizes: Sequence[int], members: Sequence[Sequence[int]], room: Sequence[int]
) -> tuple[int | None, int, int] | None:
    """(image to move or None, its pack, target pack) so that its pack then has `needed` free tokens, with the least left over."""
    by_room = sorted(range(len(room)), key=lambda pack: (room[pack], pack))
    roomiest, second = by_room[-1], by_room[-2] if len(by_room) > 1 else by_room[-1]
    best: tuple[int, int, int, int] | None = None
    for source in range(len(room)):
        if room[source] >= needed:
            return None, source, source
        target = second if source == roomiest else roomiest
        if target == source:
            continue
        for image in members[source]:
            left_over = room[source] + sizes[image] - needed
            if left_over >= 0 and sizes[image] <= room[target] and (best is None or left_over < best[0]):
                best = (left_over, image, source, target)
    return None if best is None else best[1:]
