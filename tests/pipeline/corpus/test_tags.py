from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.tags import TagShuffle


@given(
    tags=st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=9), keep=st.integers(0, 10), seed=st.integers(0, 99)
)
def test_the_same_tags_in_another_order_with_the_first_kept(tags: list[str], keep: int, seed: int) -> None:
    shuffled = TagShuffle(keep=keep).apply(" ,".join(tags), generator=np.random.default_rng(seed)).split(", ")
    plain = [tag.strip() for tag in tags]
    assert shuffled[:keep] == plain[:keep]
    assert Counter(shuffled) == Counter(plain)


def test_every_order_comes_up_and_the_share_is_kept() -> None:
    orders = Counter(TagShuffle(keep=1).apply("x, a,,b, c, ", generator=np.random.default_rng(seed)) for seed in range(600))
    assert len(orders) == 6
    assert all(order.startswith("x, ") and 60 < times < 140 for order, times in orders.items())
    few = [TagShuffle(share=0.25, separator=" ").apply("a b  c", generator=np.random.default_rng(seed)) for seed in range(600)]
    assert 0.7 < few.count("a b  c") / 600 < 0.8
    assert TagShuffle(share=0.0).apply("b,a", generator=np.random.default_rng(0)) == "b,a"
