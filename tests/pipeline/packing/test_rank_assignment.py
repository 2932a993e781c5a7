"""Dealing packs to ranks: nobody waits long, nothing is lost, and what is packed anew stays within its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cost import Floats, Ints, image_costs
from pipeline.packing.packing import NO_ROOM, assign_to_packs
from pipeline.packing.rank_assignment import assign_to_ranks, step_makespan
from pipeline.planned_steps import Pack, SampleTable, Step, StepTable

LIMIT = 100


def make_step(tokens: Ints, *, costs: Floats, packs: int, limit: int = LIMIT) -> Step:
    """A planned step of as many of these images as fit into `packs` packs."""
    assigned = assign_to_packs(tokens, costs=costs, urgency=np.zeros_like(tokens), packs=packs, tokens_per_pack=limit)
    fits = assigned != NO_ROOM
    nothing = np.zeros(int(fits.sum()), dtype=np.int64)
    columns = SampleTable(**{**dict.fromkeys(SampleTable.__dataclass_fields__, nothing), "tokens": tokens[fits]})
    table = StepTable(columns=columns, kinds=nothing, costs=costs[fits], shards=[])
    return Step(index=0, packs=table.split(assigned[fits], packs=packs), table=table, tokens_per_pack=limit)


def utilisation(step: Step, *, ranks: int, lockstep: bool) -> float:
    return step.cost / (ranks * step_makespan(assign_to_ranks(step, ranks=ranks, lockstep=lockstep), lockstep=lockstep))


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(1, LIMIT), st.floats(0.1, 1000)), min_size=1, max_size=80),
    packs=st.integers(1, 12),
    ranks=st.integers(1, 16),
    lockstep=st.booleans(),
)
def test_every_rank_gets_equally_many_packs_within_their_limit_and_no_sample_is_lost(
    images: list[tuple[int, float]], packs: int, ranks: int, lockstep: bool
) -> None:
    step = make_step(np.array([image[0] for image in images]), costs=np.array([image[1] for image in images]), packs=packs)
    rank_packs = assign_to_ranks(step, ranks=ranks, lockstep=lockstep)
    assert [len(hand) for hand in rank_packs] == [-(-packs // ranks)] * ranks
    dealt = [pack for hand in rank_packs for pack in hand]
    assert sorted(row for pack in dealt for row in pack.rows.tolist()) == list(range(step.images))
    for pack in dealt:
        assert pack.tokens == step.table.columns.tokens[pack.rows].sum() <= LIMIT
        assert pack.cost == pytest.approx(step.table.costs[pack.rows].sum())


def test_what_is_waited_for() -> None:
    rank_packs = [[Pack(rows=np.arange(1), tokens=1, cost=cost, table=None) for cost in costs] for costs in ((5, 1), (3, 4))]
    assert step_makespan(rank_packs, lockstep=False) == 7
    assert step_makespan(rank_packs, lockstep=True) == 9


def test_equal_packs_stay_as_they_were_planned() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 20, 1000)
    step = make_step(tokens, costs=tokens.astype(np.float64), packs=64, limit=200)
    for lockstep in (False, True):
        dealt = [pack for hand in assign_to_ranks(step, ranks=16, lockstep=lockstep) for pack in hand]
        assert sorted(map(id, dealt)) == sorted(map(id, step.packs))
        assert utilisation(step, ranks=16, lockstep=lockstep) > 0.97


def web_step(*, largest: int) -> Step:
    """128 packs of web sizes, of which one image is so large that it costs more than an average pack."""
    tokens = np.minimum(np.random.default_rng(0).lognormal(np.log(440), 0.9, 6000).astype(np.int64) + 1, 10_000)
    tokens = np.append(tokens[np.cumsum(tokens) <= 0.94 * 128 * 32_768], largest)
    return make_step(tokens, costs=image_costs(tokens, kinds=np.zeros_like(tokens), gamma=1, width=1152), packs=128, limit=32_768)


def test_a_rank_with_a_dear_image_has_little_else() -> None:
    step = web_step(largest=16_384)
    assert max(pack.cost for pack in step.packs) > 1.4 * step.cost / 128
    assert utilisation(step, ranks=64, lockstep=False) > 0.99


def test_in_lock_step_dear_packs_run_beside_a_dear_image() -> None:
    step = web_step(largest=16_384)
    of_packs = sorted((pack.cost for pack in step.packs), reverse=True)
    as_planned = step.cost / (64 * (of_packs[0] + of_packs[64]))
    assert utilisation(step, ranks=64, lockstep=True) > as_planned + 0.015
    assert utilisation(step, ranks=16, lockstep=True) > 0.95


def test_more_packs_where_ranks_do_not_divide_them_cost_next_to_nothing() -> None:
    step = web_step(largest=1000)
    for lockstep in (False, True):
        assert utilisation(step, ranks=48, lockstep=lockstep) > 0.97
        assert utilisation(step, ranks=200, lockstep=lockstep) > 0.9


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="ranks: 0"):
        assign_to_ranks(web_step(largest=1), ranks=0, lockstep=False)
