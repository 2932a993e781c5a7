"""Image to image, inpainting and outpainting: what is not masked does not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim import Generator
from tim.sampling.edits import Edit, Frame, outpainting

WIDTH, HEIGHT = 33, 21  # no multiples of the stride


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_network(), SPEC, device="cpu")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def mask(left: int, top: int, right: int, bottom: int) -> Image.Image:
    image = Image.new("L", (WIDTH, HEIGHT))
    image.paste(255, (left, top, right, bottom))
    return image


@pytest.mark.parametrize("feather", [0, 1, 3, 8])
@pytest.mark.parametrize("box", [(5, 4, 20, 15), (0, 0, 33, 2), (10, 10, 11, 11), (0, 0, 33, 21), (0, 0, 0, 0)])
def test_pixels_outside_the_mask_come_back_unchanged(
    generator: Generator, picture: Image.Image, box: tuple[int, int, int, int], feather: int
) -> None:
    masked = mask(*box)
    drawn = generator("a", steps=2, guidance=2.0, edit=Edit(picture, masked, strength=1.0, feather=feather))[0]
    assert drawn.size == picture.size
    outside = np.asarray(masked) == 0
    assert np.array_equal(np.asarray(drawn)[outside], np.asarray(picture)[outside])
    if (~outside).any():
        assert not np.array_equal(np.asarray(drawn)[~outside], np.asarray(picture)[~outside])


def test_the_feather_is_a_ramp_inside_the_mask_but_not_at_the_image_border(generator: Generator) -> None:
    black = Image.new("RGB", (WIDTH, HEIGHT))
    box = (0, 0, 20, HEIGHT)
    sharp = np.asarray(generator("a", steps=1, edit=Edit(black, mask(*box), strength=1.0, feather=0))[0], dtype=float)
    soft = np.asarray(generator("a", steps=1, edit=Edit(black, mask(*box), strength=1.0, feather=4))[0], dtype=float)
    share = (soft.sum((0, 2)) / np.maximum(sharp.sum((0, 2)), 1))[:20]
    assert share[:11] == pytest.approx(1, abs=0.02), "the image's own border is not softened"
    assert (np.diff(share[11:20]) < 0).all()
    assert share[19] < 0.25


def test_masks_narrower_than_the_feather_are_drawn(generator: Generator) -> None:
    grey = Image.new("RGB", (200, 64), (128, 128, 128))
    masked = Image.new("L", grey.size)
    parts = {"wide": (0, 0, 64, 64), "narrow": (100, 10, 106, 60), "small": (150, 30, 153, 33), "line": (180, 0, 181, 64)}
    for box in parts.values():
        masked.paste(255, box)
    sharp, soft = (
        np.asarray(generator("a", steps=1, edit=Edit(grey, masked, strength=1.0, feather=feather))[0], dtype=float) - 128
        for feather in (0, 8)
    )
    for part, (left, top, right, bottom) in parts.items():
        middle = (slice((top + bottom) // 2, (top + bottom) // 2 + 1), slice((left + right) // 2, (left + right) // 2 + 1))
        assert np.abs(soft[middle] - sharp[middle]).max() <= 1, part
    assert np.abs(soft[32, 63]).max() < 0.25 * np.abs(sharp[32, 63]).max() + 1, "the wide part keeps its ramp"
    assert np.array_equal(generator("a", steps=1, edit=Edit(grey, masked, strength=1.0, feather=10**9))[0].size, grey.size)


def test_strength_goes_from_the_image_to_noise(generator: Generator, picture: Image.Image) -> None:
    def distance(strength: float) -> float:
        drawn = generator("a", steps=4, edit=Edit(picture, strength=strength))[0]
        return float(np.abs(np.asarray(drawn, dtype=int) - np.asarray(picture, dtype=int)).mean())

    distances = [distance(strength) for strength in (0.001, 0.2, 0.6, 1.0)]
    assert distances[0] < 1
    assert distances == sorted(distances)
    from_noise = generator("a", width=WIDTH, height=HEIGHT, steps=4)[0]
    assert np.array_equal(np.asarray(from_noise), np.asarray(generator("a", steps=4, edit=Edit(picture, strength=1.0))[0]))


def test_borders_are_drawn_around_the_image(generator: Generator, picture: Image.Image) -> None:
    drawn = generator("a", steps=2, edit=outpainting(picture, left=3, top=5, right=10, bottom=1))[0]
    assert drawn.size == (WIDTH + 13, HEIGHT + 6)
    assert np.array_equal(np.asarray(drawn.crop((3, 5, 3 + WIDTH, 5 + HEIGHT))), np.asarray(picture))
    assert np.asarray(drawn)[:, -9:].std() > 0


def test_edits_share_packs_with_other_images(generator: Generator, picture: Image.Image) -> None:
    edit = Edit(picture, mask(5, 4, 20, 15), strength=0.7)
    together = generator(["a", "b"], width=[None, 8], height=[None, 8], steps=[2, 3], edit=[edit, None])  # pyright: ignore[reportArgumentType]
    alone = [generator("a", steps=2, edit=edit)[0], generator("b", width=8, height=8, steps=3)[0]]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_a_frame_holds_the_image_in_its_middle() -> None:
    frame = Frame.around(33, 21, stride=16)
    assert frame == (33, 21, 48, 32)
    pixels = torch.arange(3 * 21 * 33).reshape(3, 21, 33)
    padded = frame.pad(pixels)
    assert padded.shape == (3, 32, 48)
    assert torch.equal(frame.crop(padded), pixels)
    assert torch.equal(padded[:, 0, 7 : 7 + 33], pixels[:, 0])


def test_edits_that_do_not_fit_are_one_sentence(generator: Generator, picture: Image.Image) -> None:
    wrong: list[tuple[str, Edit, dict[str, Any]]] = [
        ("size 8x8: the image to edit has 33x21; leave the size out, or resize the image", Edit(picture), {"width": 8, "height": 8}),
        ("mask of 4x4: the image to edit has 33x21", Edit(picture, Image.new("L", (4, 4))), {}),
        ("strength 0: must be above 0", Edit(picture, strength=0), {}),
        ("strength nan: must be above 0", Edit(picture, strength=float("nan")), {}),
        ("image to edit of mode I;16: convert it to 8 bits", Edit(Image.new("I;16", (33, 21))), {}),
        ("mask of mode F: convert it to 8 bits", Edit(picture, Image.new("F", (33, 21))), {}),
        ("feather -1: must be a whole number of pixels", Edit(picture, feather=-1), {}),
    ]
    for message, edit, size in wrong:
        with pytest.raises(ValueError, match=message):
            generator("a", edit=edit, **size)
    with pytest.raises(ValueError, match="borders"):
        outpainting(picture)
    with pytest.raises(ValueError, match="borders"):
        outpainting(picture, left=-1, top=4)
