"""Images that are stored smaller than they came (`images.max_pixels`, `images.max_side`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dataprep.checks.verify import verify
from dataprep.examine.examine import ImageConfig
from dataprep.prepare import PrepareConfig, prepare
from dataprep.shards.manifest import read_input_counts
from pipeline.corpus.corpus import read_manifest
from tests.dataprep.helpers import digests, member, photo, row_of, table_rows, write_folder

FILES = {"small.jpg": (40, 48), "wide.jpg": (60, 300), "tall.jpg": (256, 64), "large.jpg": (200, 240), "narrow.jpg": (20, 600)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {name: photo(place, height=height, width=width) for place, (name, (height, width)) in enumerate(FILES.items())}
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90°
    files["turned.jpg"] = photo(10, height=100, width=200, exif=exif)
    rows = [{"file_name": name, "text": name} for name in files]
    return write_folder(tmp_path_factory.mktemp("scaling") / "f", files, rows=rows)


def prepared(folder: Path, out: Path, *, workers: int = 1, **images: Any) -> Path:
    config = {"images": images, "filters": {"min_side": 30, "max_aspect": 40}, "shards": {"max_samples": 2}}
    prepare([str(folder)], out=out, config=PrepareConfig.model_validate(config), workers=workers)
    assert verify(out).problems == []
    return out


def test_large_images_are_scaled_down_and_small_ones_keep_their_bytes(folder: Path, tmp_path: Path) -> None:
    out = prepared(folder, tmp_path / "C", max_side=120, max_pixels=12_000)
    counts = read_input_counts(read_manifest(out))
    assert "4 images were scaled down (images.max_side=120, images.max_pixels=12000)" in counts.notes
    assert counts.rejected == {"too-small": 1}  # filters see the size before: 20 x 600
    sizes = {row["path"]: (row["height"], row["width"]) for row in table_rows(out) if row["key"]}
    assert sizes == {"small.jpg": (40, 48), "wide.jpg": (24, 120), "tall.jpg": (120, 30), "large.jpg": (100, 120), "turned.jpg": (120, 60)}
    small = row_of(out, "small.jpg")
    assert member(out, small, "image") == (folder / "small.jpg").read_bytes()
    assert "scaled-down" not in small["detail"]
    large = row_of(out, "large.jpg")
    assert (large["original_height"], large["original_width"], large["detail"]) == (200, 240, "scaled-down")
    turned = row_of(out, "turned.jpg")
    assert (turned["original_height"], turned["original_width"]) == (100, 200)
    stored = Image.open(io.BytesIO(member(out, large, "image")))
    expected = Image.open(folder / "large.jpg").resize((120, 100), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(stored, dtype=int) - np.asarray(expected, dtype=int)).max() <= 8


def test_the_number_of_workers_does_not_matter(folder: Path, tmp_path: Path) -> None:
    one, three = (prepared(folder, tmp_path / f"w{workers}", workers=workers, max_pixels=5000) for workers in (1, 3))
    assert digests(one) == digests(three)


def test_nothing_is_scaled_by_default(folder: Path, tmp_path: Path) -> None:
    out = prepared(folder, tmp_path / "C")
    assert not any("scaled" in row["detail"] for row in table_rows(out))
    assert row_of(out, "large.jpg")["width"] == 240


@pytest.mark.parametrize("images", [{"max_pixels": 1000}, {"max_side": 64}, {"max_pixels": 1000, "max_side": 64}, {"max_pixels": 1}])
def test_stored_sizes_keep_limits_and_aspect(images: dict[str, int]) -> None:
    config = ImageConfig.model_validate(images)
    rng = np.random.default_rng(0)
    for height, width in ((int(height), int(width)) for height, width in rng.integers(1, 5000, (500, 2))):
        rows, columns = config.stored_size(height, width)
        assert 1 <= rows <= height
        assert 1 <= columns <= width
        assert rows * columns <= (config.max_pixels or 2**62)
        assert max(rows, columns) <= (config.max_side or 2**62)
        assert config.stored_size(rows, columns) == (rows, columns)
        scale = rows / height if height > width else columns / width
        if min(rows, columns) > 1:
            assert abs(rows - height * scale) <= 1.5
            assert abs(columns - width * scale) <= 1.5


@pytest.mark.parametrize("images", [{"max_pixels": 0}, {"max_side": -1}, {"max_side": "wide"}, {"max_sides": 3}])
def test_limits_that_are_none_are_refused(images: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageConfig.model_validate(images)
