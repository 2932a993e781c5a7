from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dataprep.dedup import MAX_DISTANCE, exact_duplicates, near_duplicates, perceptual_hash
from pipeline.images import read_image
from tests.dataprep.helpers import photo


def hash_of(data: bytes) -> int:
    value = perceptual_hash(read_image(data).pixels)
    assert value is not None
    return value


def test_the_hash_survives_size_and_compression_and_tells_pictures_apart() -> None:
    original = Image.open(io.BytesIO(photo(1, height=400, width=480, quality=95)))
    copies = []
    for scale, quality in ((1.0, 60), (0.5, 90), (1.5, 80)):
        buffer = io.BytesIO()
        size = (round(original.width * scale), round(original.height * scale))
        original.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
        copies.append(hash_of(buffer.getvalue()))
    first = hash_of(photo(1, height=400, width=480, quality=95))
    assert all((first ^ copy).bit_count() <= MAX_DISTANCE for copy in copies)
    others = [hash_of(photo(seed, height=400, width=480)) for seed in range(2, 30)]
    assert min((first ^ other).bit_count() for other in others) > 8


def test_flat_pictures_and_gradients_have_no_hash() -> None:
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (200, 1, 3))
    for pixels in (np.full((50, 60, 3), 77, np.uint8), ramp, np.ascontiguousarray(ramp.transpose(1, 0, 2))):
        assert perceptual_hash(pixels) is None


def test_exact_duplicates_name_the_first() -> None:
    assert exact_duplicates(["a", "b", "a", "", "", "b", "a"]) == {2: 0, 5: 1, 6: 0}


@pytest.mark.parametrize("seed", range(5))
def test_banding_finds_what_comparing_all_pairs_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hashes: list[int | None] = [int(value) for value in rng.integers(0, 2**64, 60, dtype=np.uint64)]
    for _ in range(240):
        base = hashes[rng.integers(len(hashes))]
        flips = rng.choice(64, rng.integers(0, 5), replace=False)
        hashes.append(None if base is None or rng.random() < 0.05 else base ^ sum(1 << int(bit) for bit in flips))
    pixels = [int(value) for value in rng.integers(1, 5, len(hashes))]
    sizes = [int(value) for value in rng.integers(1, 5, len(hashes))]

    kept: list[int] = []
    expected: dict[int, int] = {}
    for position in sorted(range(len(hashes)), key=lambda p: (-pixels[p], -sizes[p], p)):
        value = hashes[position]
        if value is None:
            continue
        near = [((value ^ (hashes[other] or 0)).bit_count(), rank) for rank, other in enumerate(kept)]
        distance, rank = min(near, default=(99, 0))
        if distance <= MAX_DISTANCE:
            expected[position] = kept[rank]
        else:
            kept.append(position)
    assert near_duplicates(hashes, pixels=pixels, sizes=sizes) == expected
    assert len(expected) > 50


def test_the_better_picture_stays() -> None:
    assert near_duplicates([5, 5, 4, None], pixels=[10, 20, 20, 99], sizes=[9, 1, 2, 9]) == {0: 2, 1: 2}
