"""Sizes from aspect ratios and megapixels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.arguments import MAX_PIXELS
from launch.sampling.prompts.aspect import checked_size, parse_aspect, size_of_aspect


@pytest.mark.parametrize(
    ("aspect", "megapixels", "width", "height"),
    [
        ("1:1", 1, 1024, 1024),
        ("1:1", 16, 4096, 4096),
        ("21:9", 4, 3128, 1341),
        ("9:16", 1, 768, 1365),
        ("16/9", 0.25, 683, 384),
        ("2.5", 1, 1619, 648),
        ("1.85:1", 16, 5571, 3011),
        ("4096:1", 1, 65536, 16),
        ("1:4096", 0.000001, 1, 66),
    ],
)
def test_sizes(aspect: str, megapixels: float, width: int, height: int) -> None:
    assert size_of_aspect(parse_aspect(aspect), megapixels=megapixels) == (height, width)


@given(st.floats(1 / 4096, 4096), st.floats(0.01, 16))
def test_area_and_aspect_are_close(aspect: float, megapixels: float) -> None:
    height, width = size_of_aspect(aspect, megapixels=megapixels)
    pixels = megapixels * 1024 * 1024
    sides = (width, (pixels * aspect) ** 0.5), (height, (pixels / aspect) ** 0.5)
    assert min(height, width) >= 1
    assert height * width <= MAX_PIXELS
    exceeds = math.prod(max(1, round(exact)) for _, exact in sides) > MAX_PIXELS
    for (side, exact), (other, _) in zip(sides, reversed(sides), strict=True):
        if exceeds and side >= other:  # shortened, to whole pixels, by as much as the other side was rounded up
            assert 0 <= exact - side <= 1 + 0.51 * side / other
        else:
            assert abs(side - exact) <= 0.51 or side == 1


@pytest.mark.parametrize("text", ["", "21", "21:9:1", "0:1", "1:0", "-1:2", "a:b", "1e3:1", "nan", "5000:1", "1:5000", "21 x 9", "२:१"])
def test_no_aspect(text: str) -> None:
    if text == "21":
        assert parse_aspect(text) == 21
        return
    with pytest.raises(ValueError, match="--aspect"):
        parse_aspect(text)


def test_the_option_is_named_if_a_side_is_too_long() -> None:
    assert checked_size("16:1", megapixels=16) == (1024, 16384)
    for aspect, megapixels, side in (("4096:1", 16, "width 262144"), ("1:4096", 1, "height 65536"), ("17:1", 16, "width 16888")):
        with pytest.raises(ValueError, match=rf"^--aspect {aspect} with --megapixels {megapixels}: {side}: must be"):
            checked_size(aspect, megapixels=megapixels)
    with pytest.raises(ValueError, match=r"^Aspect ratio x: expected WIDTH:HEIGHT"):
        checked_size("x", megapixels=1, names=("Aspect ratio", "Megapixels"))


@pytest.mark.parametrize("megapixels", [0, -1, 16.01, float("nan"), float("inf")])
def test_no_megapixels(megapixels: float) -> None:
    with pytest.raises(ValueError, match=r"--megapixels .* above 0 and up to 16"):
        size_of_aspect(1, megapixels=megapixels)
