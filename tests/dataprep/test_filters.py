from __future__ import annotations

import pytest

from dataprep.filters import FilterConfig, size_rejection


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [(16, 16, ""), (15, 100, "too-small"), (16, 128, ""), (16, 129, "aspect"), (800, 100, ""), (801, 100, "aspect")],
)
def test_the_default_limits_are_inclusive(height: int, width: int, reason: str) -> None:
    rejection = size_rejection(height, width=width, config=FilterConfig())
    assert (rejection[0] if rejection else "") == reason
    turned = size_rejection(width, width=height, config=FilterConfig())
    assert (turned[0] if turned else "") == reason


def test_pixel_limits_have_names_of_their_own() -> None:
    config = FilterConfig(min_pixels=1000, max_pixels=2000)
    found = [size_rejection(side, width=40, config=config) for side in (24, 25, 50, 51)]
    assert [rejection and rejection[0] for rejection in found] == ["filter:min-pixels", None, None, "filter:max-pixels"]
