from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline import randomness

IDS = [f"corpus/{i:010d}" for i in range(20_000)]


def test_draws_are_what_they_were_when_runs_began() -> None:
    """A change of these numbers breaks the resume of every run there is."""
    assert randomness.draw_key(0, "kind", 0, "corpus/0000000000") == 652573489360274759
    assert randomness.draw_key(7, "flip", 3, "corpus/0000000001") == 12955850177448963038
    assert randomness.generator(1, "noise", 2, "corpus/0000000002").integers(0, 1 << 32) == 2105149594


@given(seed=st.integers(-(2**70), 2**70), visit=st.integers(0, 2**40), row=st.integers(0, len(IDS) - 1))
def test_one_sample_is_drawn_as_in_an_array(seed: int, visit: int, row: int) -> None:
    ids = randomness.hash_ids(IDS[max(0, row - 3) : row + 3])
    together = randomness.uniforms(seed, "flip", visits=visit, ids=ids)
    assert randomness.uniform(seed, "flip", visit, IDS[row]) == together[min(row, 3)]
    assert together.min() > 0
    assert together.max() < 1


def test_every_ingredient_counts_and_the_draws_look_uniform() -> None:
    ids = randomness.hash_ids(IDS)
    drawn = [
        randomness.uniforms(seed, purpose, visits=visit, ids=ids) for seed in (0, 1) for purpose in ("kind", "flip") for visit in (0, 1)
    ]
    for values in drawn:
        counts = np.bincount((values * 50).astype(int), minlength=50)
        assert ((counts - 400) ** 2 / 400).sum() < 110  # χ² with 49 degrees of freedom exceeds this once in 10⁶
    correlation = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 0.04


def test_uniforms_never_reach_the_ends() -> None:
    ends = randomness.to_uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends[0] > 0
    assert ends[1] < 1
