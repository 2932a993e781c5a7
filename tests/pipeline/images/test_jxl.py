"""JPEG XL through Pillow's plugin: its pixels are right, and what is damaged or too large is rejected by name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.images import Rejection, read_image
from pipeline.images.formats.jxl import jxl_plugin, jxl_size

HEIGHT, WIDTH = 21, 34
ORIENTATION = 0x0112

pytestmark = pytest.mark.skipif(not jxl_plugin(), reason='no plugin for JPEG XL: pip install ".[jxl]"')


def levels(channels: int) -> NDArray[np.uint8]:
    return np.random.default_rng(channels).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def jxl(array: NDArray[np.uint8], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze()).save(buffer, "JXL", lossless=True, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(Rejection) as rejected:
        read_image(data, **options)
    return rejected.value.reason


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_are_those_that_were_written(channels: int, container: bool) -> None:
    array = levels(channels)
    colours, alpha = (array[..., :-1], array[..., -1:] / 255) if channels in (2, 4) else (array, np.ones((HEIGHT, WIDTH, 1)))
    expected = np.broadcast_to(255 * (1 - alpha) + colours * alpha, (HEIGHT, WIDTH, 3))
    assert np.abs(read_image(jxl(array, use_container=container)).pixels - expected).max() <= 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_turns_no_codestream(orientation: int) -> None:
    """ISO/IEC 18181-2, annex B: the orientation in the codestream counts. With EXIF the codestream lies in several boxes."""
    array = levels(3)
    np.testing.assert_array_equal(read_image(jxl(array, exif=exif(orientation))).pixels, array)


def test_exif_turns_a_jpeg_inside(tmp_path: Any) -> None:
    Image.fromarray(levels(3)).save(tmp_path / "a.jpg", exif=exif(6), quality=95, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "a.jxl", lossless_jpeg=True)
    found, expected = (read_image((tmp_path / name).read_bytes()).pixels for name in ("a.jxl", "a.jpg"))
    assert found.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (HEIGHT, WIDTH), (9, 700), (1080, 1920), (300, 200)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_is_known_before_anything_is_decoded(size: tuple[int, int], container: bool) -> None:
    data = jxl(np.zeros((*size, 3), np.uint8), use_container=container)
    assert jxl_size(data) == size
    assert reason(data, max_decode_pixels=size[0] * size[1] - 1) == "too-large"


def test_cut_anywhere_it_is_damaged() -> None:
    data = jxl(levels(3))
    for length in (2, 5, 11, 12, 40, len(data) // 2, len(data) - 1):
        assert reason(data[:length]) == "damaged"
