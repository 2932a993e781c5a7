from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cost import CONSISTENCY, DIFFUSION, TRANSITION, image_costs
from pipeline.packing.packing import NO_ROOM, assign_to_packs, even_out, fill_holes

CAPACITY = 100
images = st.lists(st.tuples(st.integers(1, CAPACITY), st.floats(0.1, 100), st.booleans()), max_size=60)


def test_cost_is_the_formula_and_derivatives_are_dearer() -> None:
    costs = image_costs([600, 600, 600], kinds=[DIFFUSION, CONSISTENCY, TRANSITION], gamma=2, width=100)
    assert costs.tolist() == pytest.approx([1800, 3000, 3000])


@given(images=images, ranks=st.integers(1, 9), packs_per_rank=st.integers(1, 4), head_start=st.floats(0, 300))
def test_no_pack_is_overfull_and_only_what_fits_nowhere_is_left(
    images: list[tuple[int, float, bool]], ranks: int, packs_per_rank: int, head_start: float
) -> None:
    packs = ranks * packs_per_rank
    tokens = np.array([image[0] for image in images], dtype=np.int64)
    costs = np.array([image[1] for image in images], dtype=np.float64)
    urgency = np.array([image[2] for image in images], dtype=np.int64)
    assigned = assign_to_packs(
        tokens,
        costs=costs,
        urgency=urgency,
        packs=packs,
        tokens_per_pack=CAPACITY,
        packs_per_rank=packs_per_rank,
        head_starts=np.linspace(0.0, head_start, ranks),
    )
    used = np.bincount(assigned[assigned != NO_ROOM], weights=tokens[assigned != NO_ROOM], minlength=packs)
    assert len(used) == packs
    assert used.max(initial=0) <= CAPACITY
    left = tokens[assigned == NO_ROOM]
    assert left.size == 0 or left.min() > (CAPACITY - used).max()
    if urgency.any():
        assert assigned[urgency == 1].max() != NO_ROOM  # one urgent image at least is packed: nobody waits for ever


@given(tokens=st.lists(st.integers(1, CAPACITY), max_size=40), room=st.lists(st.integers(0, CAPACITY), min_size=1, max_size=9))
def test_holes_are_filled_but_not_overfilled(tokens: list[int], room: list[int]) -> None:
    needed = np.array(tokens, dtype=np.int64)
    assigned = fill_holes(needed, room=np.array(room))
    used = np.bincount(assigned[assigned != NO_ROOM], weights=needed[assigned != NO_ROOM], minlength=len(room))
    assert (used <= room).all()
    left = needed[assigned == NO_ROOM]
    assert left.size == 0 or left.min() > (np.array(room) - used).max()


@given(images=images.filter(bool), packs=st.integers(1, 9))
def test_evening_out_keeps_every_image_and_makes_no_pack_dearer_or_overfull(images: list[tuple[int, float, bool]], packs: int) -> None:
    tokens = np.array([image[0] for image in images], dtype=np.int64)
    costs = np.array([image[1] for image in images], dtype=np.float64)
    before = np.arange(len(images)) % packs
    limit = int(np.bincount(before, weights=tokens).max())
    after = even_out(before, tokens=tokens, costs=costs, packs=packs, tokens_per_pack=limit)
    assert after.min() >= 0
    assert np.bincount(after, weights=tokens, minlength=packs).max() <= limit
    assert np.bincount(after, weights=costs, minlength=packs).max() <= np.bincount(before, weights=costs).max() * (1 + 1e-9)


def test_packs_cost_the_same() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(4, 200, 400)
    costs = image_costs(tokens, kinds=random.integers(0, 3, 400), gamma=1, width=64)
    assigned = assign_to_packs(
        tokens, costs=costs, urgency=np.zeros(400, dtype=np.int64), packs=16, tokens_per_pack=int(tokens.sum() / 16 * 1.06)
    )
    assert (assigned != NO_ROOM).all()
    total = np.bincount(assigned, weights=costs)
    assert total.max() < 1.02 * total.mean()


def test_ranks_of_several_packs_cost_the_same_where_packs_cannot() -> None:
    costs = np.array([100.0, *[1.0] * 300])
    tokens = np.array([60, *[1] * 300])
    settings = {"costs": costs, "urgency": np.zeros(301, dtype=np.int64), "packs": 8, "tokens_per_pack": 60}
    by_pack = np.bincount(assign_to_packs(tokens, **settings), weights=costs, minlength=8)
    assert by_pack.max() == 100 > 1.5 * by_pack.mean()
    by_rank = np.bincount(assign_to_packs(tokens, **settings, packs_per_rank=2) // 2, weights=costs)
    assert by_rank.max() == by_rank.mean() == 100


def test_a_head_start_is_what_a_pack_ends_cheaper_by() -> None:
    costs = np.ones(400)
    tokens = np.ones(400, dtype=np.int64)
    head_starts = np.array([0.0, 0.0, 30.0, 30.0])
    assigned = assign_to_packs(
        tokens, costs=costs, urgency=np.zeros(400, dtype=np.int64), packs=4, tokens_per_pack=200, head_starts=head_starts
    )
    assert np.bincount(assigned).tolist() == [115, 115, 85, 85]
