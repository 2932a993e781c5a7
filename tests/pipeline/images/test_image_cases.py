"""Images of public test suites that were once decoded wrong, each ending as the table beside them says."""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.images import Rejection, load_image, read_image
from pipeline.images.headers import careful_size, quick_size

REJECTED = {
    **dict.fromkeys(("bitflip.png", "broken_data_stream.png", "iphone_basi3p02.png", "jpg_extraneous.jpg"), "damaged"),
    **dict.fromkeys(("colors_text_hdr_rec2020.avif", "seine_hdr_rec2020.avif"), "unsupported"),
    **dict.fromkeys(("flower-rgb-contig-12.tif", "seq-3c-32f-9a471c2b.tiff", "j12.jpg"), "unsupported"),
    **dict.fromkeys(("issue411-ycc420.jp2", "issue412.jp2", "flower-rgb-planar-16.tif", "gray12.tif"), "unsupported"),
    **dict.fromkeys(("minisblack-2c-8b-alpha.tiff", "alpha_noispe.avif"), "unsupported"),
    "plum-blossom-small.profile0.8bpc.yuv420.alpha-full.avif": "unsupported",
    "bomb.gif": "too-large",
}
# Name → height, width and mean level of what is kept.
KEPT = {
    "testimgl.jpg": (149, 227, 105.6),
    "182.0-original.jpg": (29, 32, 134.6),
    "photoshop-200dpi-broken.jpg": (200, 200, 92.1),
    "truncated_app14.jpg": (100, 100, 12.0),
    "junk_jpeg_header.jpg": (768, 1024, 116.6),
    "peacock.s-weird.jpeg": (75, 100, 131.8),
    "peacock.s1x3.jpeg": (75, 100, 131.8),
    "weird_sampling_2.jpeg": (32, 32, 100.7),
    "png_ztxt_2MB.png": (128, 128, 88.4),
    "png_iccp_1.6MB.png": (128, 128, 88.4),
    "gray_icc_linear.png": (128, 128, 140.3),
    "gray_trns_icc_linear.png": (128, 128, 140.3),
    "grayalpha_icc_linear.png": (128, 128, 140.3),
    "gray-2-tRNS.png": (1, 4, 170.0),
    "gray-4-tRNS.png": (1, 16, 142.4),
    "kimono.crop.avif": (330, 385, 193.1),
    "colors_text_sdr_srgb.avif": (200, 200, 160.4),
    "colors_text_wcg_sdr_rec2020.avif": (200, 200, 152.5),
}


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    found = shared / "cases/images"
    if not found.is_dir():
        pytest.skip(f"no images at {found}")
    return found


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_by_name(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    with pytest.raises(Rejection) as caught:
        read_image(data)
    assert caught.value.reason == REJECTED[name], caught.value
    with pytest.raises(Rejection):
        load_image(data, resize=(16, 16), crop=(16, 16))


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_its_colours(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    image = read_image(data)
    height, width, mean = KEPT[name]
    assert image.pixels.shape == (height, width, 3)
    assert abs(float(image.pixels.mean()) - mean) < 2
    assert not image.clean  # none of them is shown alike by every reader
    size = (max(1, height // 8), max(1, width // 8))
    assert load_image(data, resize=size, crop=size).shape == (*size, 3)


def test_headers_say_what_decoding_says(folder: Path) -> None:
    """A header knows nothing of damage behind it."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        peek = partial(_peek, data)
        decoded = _end(lambda data=data: read_image(data).pixels.shape[:2])
        quick = _end(lambda peek=peek, data=data: quick_size(peek, length=len(data)))
        careful = _end(lambda peek=peek, data=data: careful_size(peek, length=len(data)))
        assert decoded in (careful, "damaged"), file.name
        assert quick in (None, decoded) or decoded == "damaged", file.name


def _peek(data: bytes, offset: int, length: int) -> bytes:
    return data[offset : offset + length]


def _end(ask: Callable[[], object]) -> object:
    """The answer, or the reason of a rejection."""
    try:
        return ask()
    except Rejection as rejection:
        return rejection.reason


def test_the_wide_gamut_image_is_as_bright_as_the_other(folder: Path) -> None:
    """Of the two the white half holds colours that sRGB has, too."""
    srgb, wide = (read_image((folder / f"colors_text_{kind}.avif").read_bytes()).pixels for kind in ("sdr_srgb", "wcg_sdr_rec2020"))
    assert np.abs(srgb[150:].astype(int) - wide[150:]).mean() < 2


def test_a_bomb_costs_nothing(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Rejection, match="too-large"):
        read_image((folder / "bomb.gif").read_bytes())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
