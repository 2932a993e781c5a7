from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.dedup.perceptual import MAX_DISTANCE, Fingerprints, exact_duplicates, near_duplicates, perceptual_hash
from dataprep.prepare import PrepareConfig, prepare
from pipeline.images import read_image
from tests.dataprep.helpers import photo, photo_folder, row_of, table_rows, write_folder


def hash_of(data: bytes) -> int:
    value = perceptual_hash(read_image(data).pixels)
    assert value is not None
    return value


def test_the_hash_survives_size_and_compression_and_tells_images_apart() -> None:
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


def test_flat_images_and_gradients_have_no_hash() -> None:
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (200, 1, 3))
    for pixels in (np.full((50, 60, 3), 77, np.uint8), ramp, np.ascontiguousarray(ramp.transpose(1, 0, 2))):
        assert perceptual_hash(pixels) is None


def fingerprints(hashes: Sequence[int | None], *, pixels: Sequence[int], sizes: Sequence[int]) -> Fingerprints:
    return Fingerprints(
        digest=np.zeros((len(hashes), 2), np.uint64),
        phash=np.array([value or 0 for value in hashes], np.uint64),
        has_phash=np.array([value is not None for value in hashes]),
        pixels=np.array(pixels),
        bytes=np.array(sizes),
    )


def test_exact_duplicates_name_the_first() -> None:
    digests = np.array([[1, 2], [1, 3], [1, 2], [0, 0], [0, 0], [1, 3], [1, 2]], np.uint64)
    assert exact_duplicates(digests).tolist() == [-1, -1, 0, -1, -1, 1, 0]
    assert exact_duplicates(digests[:0]).tolist() == []


@pytest.mark.parametrize("fixed", [0, 25])
@pytest.mark.parametrize("seed", range(3))
def test_sorting_finds_what_comparing_all_pairs_finds(seed: int, fixed: int) -> None:
    rng = np.random.default_rng(seed)
    hashes: list[int | None] = [int(value) for value in rng.integers(0, 2**64, 60, dtype=np.uint64)]
    for _ in range(240):
        base = hashes[rng.integers(len(hashes))]
        flips = rng.choice(64, rng.integers(0, 5), replace=False)
        hashes.append(None if base is None or rng.random() < 0.05 else base ^ sum(1 << int(bit) for bit in flips))
    hashes = [hashes[int(place)] for place in rng.permutation(len(hashes))]
    pixels = [int(value) for value in rng.integers(1, 5, len(hashes))]
    sizes = [int(value) for value in rng.integers(1, 5, len(hashes))]
    among = rng.random(len(hashes)) < 0.95

    kept: list[int] = []
    fate: dict[int, int] = {}  # of a hash: the image that its later ones are duplicates of
    expected = [-1] * len(hashes)
    for position in sorted(range(len(hashes)), key=lambda p: (p >= fixed, -pixels[p], -sizes[p], p)):
        value = hashes[position]
        if value is None or not among[position]:
            continue
        if value not in fate:
            near = [((value ^ (hashes[other] or 0)).bit_count(), rank) for rank, other in enumerate(kept)]
            distance, rank = min(near, default=(99, 0))
            fate[value] = kept[rank] if distance <= MAX_DISTANCE and position >= fixed else position
            if fate[value] == position:
                kept.append(position)
        if position >= fixed and fate[value] != position:
            expected[position] = fate[value]
    found = near_duplicates(fingerprints(hashes, pixels=pixels, sizes=sizes), among=among, fixed=fixed)
    assert found.tolist() == expected
    assert sum(original >= 0 for original in expected) > 50


def test_the_better_image_stays() -> None:
    found = fingerprints([5, 5, 4, None], pixels=[10, 20, 20, 99], sizes=[9, 1, 2, 9])
    assert near_duplicates(found, among=np.ones(4, bool)).tolist() == [2, 2, -1, -1]
    assert near_duplicates(found, among=np.ones(4, bool), fixed=1).tolist() == [-1, 0, 0, -1]


def test_a_crowd_of_equal_and_of_close_hashes_is_one_image() -> None:
    crowd = [0x0F0F_F0F0_1234_5678] * 2000 + [0x0F0F_F0F0_1234_5678 ^ 1 << bit for bit in range(64)]
    found = near_duplicates(fingerprints(crowd, pixels=[1] * len(crowd), sizes=[1] * len(crowd)), among=np.ones(len(crowd), bool))
    assert found.tolist() == [-1] + [0] * (len(crowd) - 1)


# ---- across sources, and against corpora that are there


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders: the second has images of its own, copies of the first's, and a smaller and a larger version of two of them."""
    first = photo_folder(tmp_path / "first", count=6)
    files = {"own.jpg": photo(50), "copy.jpg": (first / "00001.jpg").read_bytes()}
    files |= {"small.jpg": photo(2, height=36, width=43), "large.jpg": photo(3, height=200, width=240)}
    return first, write_folder(tmp_path / "second", files, rows=[{"file_name": name, "text": name} for name in files])


@pytest.mark.parametrize("near", ["mark", "drop"])
def test_across_sources_the_first_or_better_one_stays(sources: tuple[Path, Path], tmp_path: Path, near: str) -> None:
    config = PrepareConfig.model_validate({"dedup": {"near": near}})
    out = tmp_path / "C"
    counts = prepare([str(path) for path in sources], out=out, config=config)
    assert counts.rejected == ({"duplicate": 1} if near == "mark" else {"duplicate": 1, "near-duplicate": 2})
    assert row_of(out, "copy.jpg")["duplicate_of"] == row_of(out, "00001.jpg")["key"]
    assert row_of(out, "copy.jpg")["detail"] == "same bytes as first/00001.jpg"
    assert row_of(out, "small.jpg")["near_duplicate_of"] == row_of(out, "00002.jpg")["key"]
    assert row_of(out, "00003.jpg")["near_duplicate_of"] == row_of(out, "large.jpg")["key"]


@pytest.mark.parametrize("near", ["mark", "drop", "off"])
def test_against_a_corpus_what_is_there_stays(sources: tuple[Path, Path], tmp_path: Path, near: str) -> None:
    first, second = sources
    config = PrepareConfig.model_validate({"dedup": {"near": near}})
    old, out = tmp_path / "old", tmp_path / "C"
    prepare([str(first)], out=old, config=config)
    counts = prepare([str(second)], out=out, config=config, against=[old])
    assert counts.rejected == ({"duplicate": 1, "near-duplicate": 2} if near == "drop" else {"duplicate": 1})
    ids = {row["path"]: f"first/{row['key']}" for row in table_rows(old)}
    assert row_of(out, "copy.jpg")["duplicate_of"] == ids["00001.jpg"]
    assert row_of(out, "copy.jpg")["detail"] == f"same bytes as {ids['00001.jpg']}"
    marks = [row_of(out, name)["near_duplicate_of"] for name in ("small.jpg", "large.jpg", "own.jpg")]
    assert marks == (["", "", ""] if near == "off" else [ids["00002.jpg"], ids["00003.jpg"], ""])
    with pytest.raises(ValueError, match="another against"):
        prepare([str(second)], out=out, config=config)


def test_an_exact_copy_of_a_dropped_image_names_the_one_that_stayed(tmp_path: Path) -> None:
    files = {"a.jpg": photo(1), "b.jpg": photo(1), "large.jpg": photo(1, height=200, width=240)}
    folder = write_folder(tmp_path / "f", files, rows=[{"file_name": name, "text": name} for name in files])
    out = tmp_path / "C"
    counts = prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"dedup": {"near": "drop"}}))
    assert counts.rejected == {"duplicate": 1, "near-duplicate": 1}
    assert row_of(out, "b.jpg")["duplicate_of"] == row_of(out, "large.jpg")["key"]


def test_a_corpus_without_hashes_cannot_be_compared(sources: tuple[Path, Path], tmp_path: Path) -> None:
    from dataprep.index_tars import index

    prepare([str(sources[0])], out=tmp_path / "old", config=PrepareConfig())
    index([str(tmp_path / "old/*.tar")], out=tmp_path / "index")
    with pytest.raises(ValueError, match=r"^against [^\n]*index: its tables have no column [^\n]*$"):
        prepare([str(sources[1])], out=tmp_path / "C", config=PrepareConfig(), against=[tmp_path / "index"])
    assert not (tmp_path / "C").exists()
