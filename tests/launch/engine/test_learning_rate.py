from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from launch.config.schema import TrainConfig
from launch.engine.learning_rate import learning_rate


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    constant = TrainConfig(steps=100, lr=2.0, warmup=4)
    assert [learning_rate(step, constant) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = TrainConfig(steps=104, lr=2.0, warmup=4, schedule="cosine")
    rates = [learning_rate(step, cosine) for step in range(105)]
    assert rates[4] == 2.0
    assert rates[54] == pytest.approx(1.0)
    assert rates[104] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))


def test_a_linear_decay_ends_at_zero() -> None:
    linear = TrainConfig(steps=104, lr=2.0, warmup=4, schedule="linear")
    rates = [learning_rate(step, linear) for step in range(105)]
    assert rates[3:5] == [2.0, 2.0]
    assert rates[54] == pytest.approx(1.0)
    assert rates[104] == 0.0
    assert rates[103] == pytest.approx(2.0 / 100)


def test_wsd_is_constant_until_its_decay() -> None:
    wsd = TrainConfig(steps=100, lr=2.0, warmup=10, schedule="wsd", decay=40)
    rates = [learning_rate(step, wsd) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert set(rates[10:61]) == {2.0}
    assert rates[80] == pytest.approx(1.0)
    assert rates[100] == 0.0
    by_default = TrainConfig(steps=100, lr=2.0, schedule="wsd")
    assert [learning_rate(step, by_default) for step in (0, 80, 90)] == [2.0, 2.0, 1.0]


def test_a_longer_run_only_prolongs_what_is_constant() -> None:
    short, long = (TrainConfig(steps=steps, warmup=10, schedule="wsd", decay=40) for steps in (100, 200))
    assert [learning_rate(step, short) for step in range(61)] == [learning_rate(step, long) for step in range(61)]
    assert [learning_rate(step, short) for step in range(60, 101)] == [learning_rate(step, long) for step in range(160, 201)]


@pytest.mark.parametrize("settings", [{"schedule": "cosine", "decay": 5}, {"schedule": "wsd", "decay": 95, "warmup": 10}])
def test_a_decay_must_fit(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"only for schedule=wsd, not cosine: leave it out|10 warm-up steps and 95 steps of decay"):
        TrainConfig(steps=100, **settings)  # pyright: ignore[reportArgumentType]
