from __future__ import annotations

import time
from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.streams.shuffle import order, shard_order


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_it_is_a_bijection(count: int, key: int) -> None:
    assert np.array_equal(np.sort(order(np.arange(count), count=count, key=key)), np.arange(count))


@given(count=st.integers(1, 10**12), key=st.integers(0, 2**64 - 1), data=st.data())
def test_positions_can_be_asked_for_alone(count: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5, unique=True))
    found = order(positions, count=count, key=key)
    assert [int(order([position], count=count, key=key)[0]) for position in positions] == found.tolist()
    assert len(set(found.tolist())) == len(positions)
    assert found.min() >= 0
    assert found.max() < count


def test_all_orders_of_few_things_occur_about_equally_often() -> None:
    seen = [tuple(order(np.arange(3), count=3, key=key).tolist()) for key in range(600)]
    counts = [seen.count(each) for each in permutations(range(3))]
    assert min(counts) > 60
    assert max(counts) < 140


def test_an_epoch_is_in_another_order_and_far_from_sorted() -> None:
    first, second = (shard_order(np.arange(1000), count=1000, seed=0, epoch=epoch) for epoch in (0, 1))
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_a_billion_things_take_no_memory() -> None:
    start = time.process_time()
    order(np.arange(100_000), count=3_000_000_000, key=1)
    assert time.process_time() - start < 1
