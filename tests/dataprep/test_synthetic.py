from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.synthetic import (
    COLOURS,
    SHAPES,
    Figure,
    figures,
    random_image,
    random_view,
    read_figure,
    read_speckles,
    write_corpus,
)


def test_what_is_drawn_is_read_back() -> None:
    for index in range(400):
        image, figure = random_image(seed=1, index=index)
        assert read_figure(image) == figure, f"image {index}"


def test_it_is_read_back_through_noise_and_jpeg_like_blur() -> None:
    rng = np.random.default_rng(0)
    right = 0
    for index in range(200):
        image, figure = random_image(seed=2, index=index)
        noisy = np.asarray(image, dtype=float) + rng.normal(0, 12, (image.height, image.width, 3))
        right += read_figure(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))) == figure
    assert right >= 196


def test_what_shows_nothing_reads_as_nothing() -> None:
    plain = Image.new("RGB", (32, 32), COLOURS["red"])
    assert read_figure(plain) == Figure(None, None, "red")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert read_figure(Image.fromarray(noise)).shape is None


def test_images_follow_from_seed_and_index_and_keep_their_limits() -> None:
    sizes = []
    for index in range(300):
        image, figure = random_image(seed=3, index=index)
        assert random_image(seed=3, index=index)[1] == figure
        sizes.append(image.size)
    width, height = np.array(sizes).T
    assert min(width.min(), height.min()) >= 16
    assert max(width.max(), height.max()) <= 64
    assert (width / height).max() <= 3.1
    assert (height / width).max() <= 3.1
    assert len(set(sizes)) > 200
    assert random_image(seed=4, index=0)[0].tobytes() != random_image(seed=3, index=0)[0].tobytes()


def test_speckled_grounds_are_told_from_plain_ones_and_hide_few_figures() -> None:
    rng = np.random.default_rng(0)
    right = 0
    for figure in figures():
        for height, width in ((32, 32), (20, 40), (48, 24)):
            speckled = random_view(figure, height=height, width=width, rng=rng, speckled=True)
            right += read_figure(speckled) == figure
            assert 0.6 < read_speckles(speckled, ground=str(figure.ground)) < 1.4
            assert read_speckles(random_view(figure, height=height, width=width, rng=rng), ground=str(figure.ground)) < 0.5
    assert right >= 0.93 * 3 * len(figures())
    image, _ = random_image(seed=1, index=0, speckled=True)
    assert image.height % 4 == image.width % 4 == 0
    with pytest.raises(ValueError, match="has no background that its figure leaves free"):
        read_speckles(Image.new("RGB", (8, 8)), ground="red")


def test_captions_name_the_figure() -> None:
    assert len(figures()) == len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1)
    assert len({figure.caption for figure in figures()}) == len(figures())
    assert Figure("circle", "red", "blue").caption == "a red circle on blue"


def test_the_corpus_is_an_image_folder(tmp_path: Path) -> None:
    write_corpus(tmp_path / "images", count=12, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "images/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert read_figure(Image.open(tmp_path / "images" / row["file_name"])).caption == row["text"]
