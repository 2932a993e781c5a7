"""pack_stream: any webdataset stream in packs, by the rule and the packer of planned training."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.compat import WebDataset

from pipeline import StreamedPack, pack_stream
from pipeline.images import Rejection, read_image
from pipeline.images.decoded import to_pixels
from pipeline.size_rule import SizeRule, target_size
from tests.pipeline.conftest import image, varied

LIMITS: dict[str, Any] = {"max_tokens": 16, "tokens_per_pack": 24, "stride": 16, "packs": 4}
SAMPLES = varied(60, seed=3)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tars of JPEG and PNG images, one of them no image at all."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index in range(30 * number, 30 * number + 30):
                extension = "png" if index % 5 == 0 else "jpg"
                members = {extension: file_of(index, "PNG" if extension == "png" else "JPEG"), "txt": f"caption {index}".encode()}
                if index == 41:
                    members["jpg"] = b"no image"
                for name, data in members.items():
                    header = tarfile.TarInfo(f"{index:06d}.{name}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    return [str(folder / f"{number}.tar") for number in range(2)]


def file_of(index: int, format: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image(SAMPLES[index].height, SAMPLES[index].width, seed=index)).save(buffer, format, **how)
    return buffer.getvalue()


def packs_of(urls: list[str], *decoders: str) -> tuple[list[StreamedPack], Counter[str]]:
    stage = pack_stream(**LIMITS)
    data = WebDataset(urls, shardshuffle=False)
    data = data.decode(*decoders) if decoders else data
    return list(data.compose(stage)), stage.left_out


def test_every_sample_is_in_one_pack_at_the_size_of_the_rule(tars: list[str]) -> None:
    packs, left_out = packs_of(tars)
    keys = [sample["__key__"] for pack in packs for sample in pack.samples]
    assert len(keys) == len(set(keys)) == 60 - left_out.total()
    assert left_out["not-an-image"] == 1
    rule = SizeRule(stride=16, max_tokens=16)
    for pack in packs:
        assert pack.tokens == sum(image.shape[1] * image.shape[2] // 256 for image in pack.images) <= LIMITS["tokens_per_pack"]
        for sample, pixels in zip(pack.samples, pack.images, strict=True):
            assert pixels.dtype == torch.uint8
            size = SAMPLES[int(sample["__key__"])]
            target = target_size(size.height, width=size.width, rule=rule)
            assert tuple(pixels.shape) == (3, target.height, target.width)
            assert sample["txt"] == f"caption {int(sample['__key__'])}".encode()
            assert not {"jpg", "png"} & set(sample)
    full = [pack.tokens for pack in packs[:-4]]
    assert sum(full) / (len(full) * LIMITS["tokens_per_pack"]) > 0.95


def test_packs_depend_on_the_stream_alone(tars: list[str]) -> None:
    first, second, piped = (packs_of(urls)[0] for urls in (tars, tars, [f"pipe:cat {tar}" for tar in tars]))
    for other in (second, piped):
        assert [[sample["txt"] for sample in pack.samples] for pack in other] == [[s["txt"] for s in pack.samples] for pack in first]
        pairs = zip((image for pack in first for image in pack.images), (image for pack in other for image in pack.images), strict=True)
        assert all(torch.equal(one, same) for one, same in pairs)


@pytest.mark.parametrize("decoder", ["pil", "rgb8", "rgb", "torchrgb8", "torchrgb"])
def test_decoded_images_give_the_same_packs(decoder: str, tars: list[str]) -> None:
    good = tars[:1]
    files, decoded = packs_of(good)[0], packs_of(good, decoder)[0]
    assert [[sample["__key__"] for sample in pack.samples] for pack in decoded] == [[s["__key__"] for s in pack.samples] for pack in files]
    for one, other in zip(files, decoded, strict=True):
        for file, pixels in zip(one.images, other.images, strict=True):
            assert (file.int() - pixels.int()).abs().float().mean() < 1


def test_the_buffer_is_bounded() -> None:
    """A pack leaves as soon as the stream has brought as many tokens as all packs hold."""
    taken = 0

    def stream() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield {"image": np.zeros((32, 32, 3), np.uint8)}

    packs = pack_stream(**LIMITS)(stream())
    for done in range(1, 9):
        assert next(packs).tokens == 24
        assert taken <= 6 * (4 * ((done - 1) // 4) + 4)


def test_what_is_left_out_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    stage = pack_stream(**LIMITS)
    samples = [
        {"__key__": "a", "txt": "no image"},
        {"__key__": "b", "jpg": np.zeros((8, 40, 3), np.uint8)},
        {"__key__": "c", "jpg": np.zeros((16, 160, 3), np.uint8)},
        {"__key__": "d", "jpg": b""},
        {"__key__": "e", "jpg": np.zeros((16, 16, 3), np.uint8)},
    ]
    [pack] = stage(samples)
    assert [sample["__key__"] for sample in pack.samples] == ["e"]
    assert stage.left_out == {"no-image": 1, "too-small": 1, "aspect": 1, "empty": 1}
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [f"{key} of the stream" for key in "abcd"]


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="largest image must fit into a pack"):
        pack_stream(max_tokens=64, tokens_per_pack=32)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_pil_images_are_normalised_as_files_are(mode: str) -> None:
    gradient = Image.fromarray(image(24, 40, seed=5))
    if mode == "I;16":
        opened = Image.fromarray(np.asarray(gradient.convert("L")).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        opened = gradient.convert(mode)
        opened.putalpha(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))))
    else:
        opened = gradient.convert(mode)
    buffer = io.BytesIO()
    opened.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(to_pixels(Image.open(io.BytesIO(buffer.getvalue()))), read_image(buffer.getvalue()).pixels)


def test_orientation_counts_until_it_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(0, "JPEG", exif=exif, quality=95)
    opened = Image.open(io.BytesIO(data)).convert("RGB")  # as webdataset's decoder does
    assert np.array_equal(to_pixels(opened), read_image(data).pixels)
    assert to_pixels(opened).shape[:2] == (SAMPLES[0].width, SAMPLES[0].height)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("text", "array of shape"),
        (np.zeros((4, 4, 2), np.uint8), "array of shape"),
        (np.zeros((0, 4, 3), np.uint8), "array of shape"),
        (np.full((4, 4, 3), 255.0), "from 255 to 255, expected 0 to 1"),
        (np.full((4, 4, 3), np.nan), "from nan to nan"),
        (np.zeros((4, 4, 3), np.int32), "an array of int32"),
    ],
)
def test_what_is_no_image_is_rejected(wrong: Any, reason: str) -> None:
    with pytest.raises(Rejection, match=reason):
        to_pixels(wrong)
