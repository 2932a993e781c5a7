from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.size_rule import SizeRule, target_size, target_sizes

rules = st.builds(
    SizeRule,
    stride=st.sampled_from([1, 2, 4, 8, 14, 16, 32, 64]),
    max_tokens=st.integers(1, 20_000),
    max_pixels=st.none() | st.integers(1, 4096**2),
    min_tokens=st.integers(1, 4),
    max_aspect=st.floats(1, 20),
)
sides = st.integers(1, 9000)


@given(height=sides, width=sides, rule=rules)
def test_what_is_kept_obeys_the_rule(height: int, width: int, rule: SizeRule) -> None:
    target = target_size(height, width=width, rule=rule)
    too_long = max(height, width) > rule.max_aspect * min(height, width)
    assert (target.left_out == "aspect") == too_long
    assert (target.left_out == "too-small") == (not too_long and target.tokens < rule.min_tokens)
    if target.left_out:
        return
    resize_height, resize_width = target.resize
    assert resize_height <= height  # never enlarged
    assert resize_width <= width
    assert abs(resize_height / height - resize_width / width) <= 1 / height + 1 / width  # never squashed: whole pixels are all that differs
    assert 0 <= resize_height - target.height < rule.stride  # less than one stride cut from a side
    assert 0 <= resize_width - target.width < rule.stride
    assert target.height % rule.stride == target.width % rule.stride == 0
    assert target.tokens == (target.height // rule.stride) * (target.width // rule.stride)
    assert rule.min_tokens <= target.tokens <= rule.max_tokens
    assert resize_height * resize_width <= (rule.max_pixels or np.inf)


@given(height=sides, width=sides, rule=rules)
def test_nothing_is_scaled_without_need(height: int, width: int, rule: SizeRule) -> None:
    target = target_size(height, width=width, rule=rule)
    largest = min(rule.max_tokens * rule.stride**2, rule.max_pixels or np.inf)
    if height * width <= largest:
        assert target.resize == (height, width)
    else:  # and no more than needed: one pixel more on both sides would be too much
        assert (target.resize[0] + 1) * (target.resize[1] + 1) > largest


@given(sizes=st.lists(st.tuples(sides, sides), max_size=30), rule=rules)
def test_arrays_give_what_single_images_give(sizes: list[tuple[int, int]], rule: SizeRule) -> None:
    together = target_sizes([size[0] for size in sizes], widths=[size[1] for size in sizes], rule=rule)
    alone = [target_size(height, width=width, rule=rule) for height, width in sizes]
    assert together.tokens.tolist() == [target.tokens for target in alone]
    assert list(zip(together.resize_height.tolist(), together.resize_width.tolist(), strict=True)) == [target.resize for target in alone]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), ((256, 256), 256, 256)),  # whole multiples stay whole
        ((768, 512), ((313, 209), 304, 208)),
        ((200, 300), ((200, 300), 192, 288)),  # small enough: cropped only
        ((4096, 4096), ((256, 256), 256, 256)),
        ((600, 400), ((313, 209), 304, 208)),
    ],
)
def test_examples(size: tuple[int, int], expected: tuple[tuple[int, int], int, int]) -> None:
    target = target_size(size[0], width=size[1], rule=SizeRule(stride=16, max_tokens=256))
    assert (target.resize, target.height, target.width) == expected


def test_squash_is_the_published_recipe() -> None:
    target = target_size(333, width=500, rule=SizeRule(stride=32, max_tokens=1024, fit="squash"))
    assert target.resize == (target.height, target.width) == (320, 480)


def test_reasons() -> None:
    rule = SizeRule(stride=16, max_tokens=256, min_tokens=4, max_aspect=4)
    assert target_size(15, width=16, rule=rule).left_out == "too-small"
    assert target_size(47, width=16, rule=rule).left_out == "too-small"
    assert target_size(100, width=401, rule=rule).left_out == "aspect"
    assert target_size(100, width=400, rule=rule).left_out == ""
    assert target_size(0, width=0, rule=rule).left_out == target_size(-1, width=-1, rule=rule).left_out == "no-size"
