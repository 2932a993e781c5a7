"""Loss masks: scaled, cropped, mirrored and turned exactly like their images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import Rejection, load_image, read_image
from pipeline.images.decode import UPRIGHT
from pipeline.images.masks import BadMask, encode_mask, fits, load_mask, place_mask, read_mask
from pipeline.size_rule import SizeRule, target_size

SIDES = st.integers(24, 90)
RULES = st.sampled_from(
    [SizeRule(stride=8, max_tokens=36), SizeRule(stride=16, max_tokens=4, fit="squash"), SizeRule(stride=8, max_tokens=200)]
)


def scene(height: int, width: int, *, seed: int) -> np.ndarray:
    """A smooth grey picture without symmetry, (H, W) uint8: at once an image and its own mask."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3), dtype=np.uint8)
    corners[0, 0], corners[-1, -1] = 255, 0
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, rule=RULES, flip=st.booleans(), factor=st.sampled_from([1, 2, 8]), seed=st.integers(0, 99))
def test_a_mask_is_where_its_image_is(height: int, width: int, rule: SizeRule, flip: bool, factor: int, seed: int) -> None:
    target = target_size(height, width=width, rule=rule)
    if target.left_out:
        return
    greys = (32 + 0.75 * scene(height, width, seed=seed)).astype(np.uint8)  # far enough from black and white that no filter is clipped
    data, crop = png(greys), (target.height, target.width)
    image = load_image(data, resize=target.resize, crop=crop, flip=flip)[..., 0].astype(float) / 255
    cells = load_mask(data, resize=target.resize, crop=crop, flip=flip, factor=factor, slack=rule.stride)
    assert cells.shape == (crop[0] // factor, crop[1] // factor)
    expected = image.reshape(cells.shape[0], factor, cells.shape[1], factor).mean(axis=(1, 3))
    assert np.abs(cells - expected).max() < 0.08  # another filter than the image's; a pixel's shift of the steepest scene is more
    assert abs((cells - expected).mean()) < 0.01
    if flip:
        unflipped = load_mask(data, resize=target.resize, crop=crop, flip=False, factor=factor, slack=rule.stride)
        assert np.array_equal(cells, unflipped[:, ::-1])


@settings(max_examples=20, deadline=None)
@given(height=SIDES, width=SIDES, rule=RULES, flip=st.booleans())
def test_white_is_one_and_nothing_else(height: int, width: int, rule: SizeRule, flip: bool) -> None:
    target = target_size(height, width=width, rule=rule)
    if not target.left_out:
        white = png(np.full((height, width), 255, np.uint8))
        cells = load_mask(white, resize=target.resize, crop=(target.height, target.width), flip=flip, factor=8, slack=rule.stride)
        assert (cells == 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_mask_is_turned_like_its_image_if_its_shape_says_so(orientation: int, is_turned: bool) -> None:
    """Painted over the file's pixels, or over the upright image: only the shape of a quarter turn tells."""
    stored = np.stack([scene(40, 60, seed=3)] * 3, axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    upright = read_image(buffer.getvalue()).pixels
    painted = upright[..., 0] if is_turned else stored[..., 0]
    if not is_turned and orientation in (2, 3, 4):
        return  # by its shape, a mask of the upright image
    placed = place_mask(painted, size=upright.shape[:2], stored=upright.shape[:2], orientation=orientation)
    assert np.array_equal(placed, upright[..., 0])
    assert orientation == 1 or orientation in UPRIGHT


def test_kinds_of_files() -> None:
    grey = scene(20, 30, seed=1)
    assert np.array_equal(read_mask(png(grey)), grey)
    assert np.array_equal(read_mask(encode_mask(grey)), grey)
    assert np.array_equal(read_mask(png(np.stack([grey] * 3, axis=-1))), grey)
    assert set(np.unique(read_mask(png(grey > 128)))) == {0, 255}  # one bit
    painted = np.zeros((20, 30, 4), np.uint8)
    painted[:10] = 255
    painted[10:, :, :3] = 255  # white, but transparent
    assert read_mask(png(painted)).tolist() == [[255] * 30] * 10 + [[0] * 30] * 10
    with pytest.raises(Rejection):
        read_mask(png(grey)[:-40])


def test_sizes_that_differ() -> None:
    small = place_mask(scene(30, 20, seed=1), size=(300, 200), stored=(150, 100))
    assert small.shape == (150, 100)
    with pytest.raises(BadMask, match="is 30x20 pixels, its image 200x300: they need the same aspect ratio"):
        place_mask(scene(20, 30, seed=1), size=(300, 200), stored=(300, 200))
    with pytest.raises(BadMask, match="is black everywhere"):
        place_mask(np.zeros((30, 20), np.uint8), size=(30, 20), stored=(30, 20))
    with pytest.raises(BadMask, match="is 30x20 pixels, its image scales to 64x64: another aspect ratio"):
        load_mask(png(scene(20, 30, seed=1)), resize=(64, 64), crop=(64, 64), flip=False, factor=8)
    with pytest.raises(BadMask, match="is black everywhere"):
        load_mask(png(np.zeros((64, 64), np.uint8)), resize=(64, 64), crop=(64, 64), flip=False, factor=8)
    edge = np.zeros((64, 70), np.uint8)
    edge[:, -3:] = 255
    with pytest.raises(BadMask, match="is black in all of the image that is trained"):
        load_mask(png(edge), resize=(64, 70), crop=(64, 64), flip=False, factor=8)
    assert fits((301, 199), (300, 200))
    assert not fits((320, 200), (300, 200))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_of_ones_instead_of_white_are_refused(dtype: type) -> None:
    """Arrays of 0 and 1 saved as they are, or 8-bit values in a 16-bit file: the image would count as nothing."""
    ones = (scene(64, 64, seed=1) > 128).astype(dtype) * (255 if dtype == np.uint16 else 1)
    said = r"is nearly black: its brightest pixel is 1 of 255; write 255 \(in a 16-bit file 65535\) where the image is trained"
    with pytest.raises(BadMask, match=said):
        place_mask(read_mask(png(ones)), size=(64, 64), stored=(64, 64))
    with pytest.raises(BadMask, match=said):
        load_mask(png(ones), resize=(64, 64), crop=(64, 64), flip=False, factor=8)
    wide = (scene(64, 64, seed=1) > 128).astype(np.uint16) * 65535
    assert set(np.unique(read_mask(png(wide)))) == {0, 255}
