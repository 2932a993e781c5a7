"""The labelled grid."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from launch.sampling.image_grid import LARGEST_GRID, SMALL, grid


def pixels_of(image: Image.Image, colour: str) -> int:
    wanted = np.asarray(Image.new("RGB", (1, 1), colour))
    return int((np.asarray(image) == wanted).all(axis=2).sum())


def test_every_image_of_any_size_is_shown_whole() -> None:
    sizes = {"red": (200, 300), "blue": (400, 100), "lime": (160, 160), "magenta": (48, 500)}
    red, blue, lime, magenta = (Image.new("RGB", size, colour) for colour, size in sizes.items())
    image = grid([[red, blue], [lime, magenta]], row_labels=["a row × 2", "another\nwith two lines"], column_labels=["1 step", "2 steps"])
    for colour, (width, height) in sizes.items():
        assert pixels_of(image, colour) == width * height


def test_small_images_are_enlarged_and_huge_grids_reduced() -> None:
    tiny = grid([[Image.new("RGB", (32, 16), "red")]], row_labels=["r"], column_labels=["c"])
    assert pixels_of(tiny, "red") == (SMALL // 32) ** 2 * 32 * 16
    wide = grid([[Image.new("RGB", (4096, 64), "red")] * 4], row_labels=["r"], column_labels=list("abcd"))
    high = grid([[Image.new("RGB", (64, 4096), "red")]] * 4, row_labels=list("abcd"), column_labels=["c"])
    assert wide.width <= LARGEST_GRID
    assert high.height <= LARGEST_GRID


@pytest.mark.parametrize("images", [[], [[]], [[Image.new("RGB", (8, 8))], []]])
def test_nothing_to_show_is_a_value_error(images: list[list[Image.Image]]) -> None:
    with pytest.raises(ValueError, match="grid"):
        grid(images, row_labels=["r"] * len(images), column_labels=["c"])


def test_labels_must_match() -> None:
    with pytest.raises(ValueError, match="label"):
        grid([[Image.new("RGB", (8, 8))]], row_labels=["r"], column_labels=[])
