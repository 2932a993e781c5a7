from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pydantic import ValidationError

from dataprep.examine.filters import RULES, FilterConfig, Filters, Subject, contrast, sharpness
from dataprep.prepare import PrepareConfig, prepare
from tests.dataprep.helpers import photo, row_of, write_folder


def subject(pixels: np.ndarray | None = None, *, bytes: int = 99, caption: str = "", extra: dict[str, Any] | None = None) -> Subject:
    return Subject(pixels=np.zeros((40, 50, 3), np.uint8) if pixels is None else pixels, bytes=bytes, caption=caption, extra=extra or {})


def reason(config: FilterConfig, judged: Subject) -> str:
    rejection = Filters(config).rejection(judged)
    assert rejection is None or "\n" not in rejection[1]
    return rejection[0] if rejection else ""


def rough(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(16, 16, ""), (15, 100, "too-small"), (16, 128, ""), (16, 129, "aspect"), (800, 100, ""), (801, 100, "aspect")],
)
def test_the_default_limits_are_inclusive(height: int, width: int, expected: str) -> None:
    for shape in ((height, width, 3), (width, height, 3)):
        assert reason(FilterConfig(), subject(np.zeros(shape, np.uint8))) == expected


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("pixels", [subject(np.zeros((side, 50, 3), np.uint8)) for side in (20, 30, 40)]),
        ("bytes", [subject(bytes=count) for count in (1000, 1500, 2000)]),
        ("caption_characters", [subject(caption="é" * count) for count in (1000, 1500, 2000)]),
        ("caption_words", [subject(caption="to " * count) for count in (1000, 1500, 2000)]),
    ],
)
def test_every_pair_of_limits_is_inclusive_and_counted_by_its_name(what: str, values: list[Subject]) -> None:
    names = (f"filter:min-{what}".replace("_", "-"), f"filter:max-{what}".replace("_", "-"))
    for least, most, expected in ((1000, 2000, ("", "", "")), (1001, 1999, (names[0], "", names[1]))):
        config = FilterConfig.model_validate({f"min_{what}": least, f"max_{what}": most})
        assert tuple(reason(config, value) for value in values) == expected
        assert {reason(FilterConfig(), value) for value in values} == {""}


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    pixels = rough(60, 80)
    luma = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)
    kernel = {(0, 1): 1, (2, 1): 1, (1, 0): 1, (1, 2): 1, (1, 1): -4}
    laplacian = sum(weight * luma[y : y + 58, x : x + 78] for (y, x), weight in kernel.items())
    assert sharpness(subject(pixels)) == pytest.approx(np.var(laplacian), abs=0.01)
    assert contrast(subject(pixels)) == pytest.approx(luma.std(), abs=0.01)
    assert sharpness(subject(rough(2, 80))) == 0
    assert contrast(subject(np.full((50, 50, 3), 200, np.uint8))) == 0


def test_blur_and_flatness_are_told_from_sharp_images_of_any_size() -> None:
    config = FilterConfig(min_sharpness=50, min_contrast=5)
    for side in (200, 3000):
        drawn = Image.fromarray(rough(25, 25)).resize((side, side), Image.Resampling.NEAREST)
        blurred = drawn.resize((12, 12)).resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(side / 40))
        assert reason(config, subject(np.asarray(drawn))) == ""
        assert reason(config, subject(np.asarray(blurred))) == "filter:min-sharpness"
        assert reason(config, subject(np.full((side, side, 3), (90, 90, 93), np.uint8))) == "filter:min-contrast"


@pytest.mark.parametrize(
    ("extra", "kept"),
    [({"clip": 0.3}, True), ({"clip": 0.2}, False), ({"clip": "0.3"}, True), ({"clip": "n/a"}, False), ({}, False), ({"clip": [1]}, False)],
)
def test_scores_of_the_sources_are_filtered_by_name(extra: dict[str, Any], kept: bool) -> None:
    config = FilterConfig(where={"clip": "clip >= 0.28 and width >= 50"})
    assert reason(config, subject(extra=extra)) == ("" if kept else "filter:clip")
    text = FilterConfig(where={"free": "licence in ('cc0', '2')"})
    assert [reason(text, subject(extra={"licence": said})) for said in ("cc0", "2", 2, None)] == ["", "", "filter:free", "filter:free"]


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ({"clip": "clip >="}, "is not an expression"),
        ({"min-bytes": "a > 1"}, "choose another"),
        ({"a b": "a > 1"}, "is not a name for a filter"),
    ],
)
def test_impossible_expressions_are_refused_at_once(where: dict[str, str], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        FilterConfig(where=where)


def test_a_mistyped_column_is_one_error_and_not_the_end_of_every_input(tmp_path: Path) -> None:
    files = {f"{number}.jpg": photo(number) for number in range(4)}
    rows: list[dict[str, Any]] = [{"file_name": name, "text": name, "licence": "cc0"} for name in files]
    rows[3]["score"] = 0.9
    first = write_folder(tmp_path / "f", files, rows=[{"file_name": name, "text": name} for name in files])
    sources = [str(first), str(write_folder(tmp_path / "g", {name: photo(9 + int(name[0])) for name in files}, rows=rows))]

    def kept(where: dict[str, str]) -> int:
        filters = {"filters": {"where": where}, "sources": {"g": {"path": sources[1], "tags": ["art"]}}}
        return prepare(sources[:1], out=tmp_path / "-".join(where), config=PrepareConfig.model_validate(filters)).kept

    known = "licence, score, source_tags"
    for column, remedy in (("scor", "did you mean score?"), ("zzz", f"there are: {known}")):
        wrong = f"filters.where.good: the first 1,000 inputs of the sources have no column {column}; {remedy}"
        with pytest.raises(ValueError, match=f"^{re.escape(wrong)}$"):
            kept({"good": f"{column} > 0.5", "sides": "width > 3"})
    languages = PrepareConfig.model_validate({"captions": {"languages": ["en"], "language_column": "licens"}})
    with pytest.raises(ValueError, match=r"^captions\.language_column: .* have no column licens; did you mean licence\?$"):
        prepare(sources, out=tmp_path / "C", config=languages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "g"]
    assert kept({"good": "score > 0.5", "sides": "width > 3"}) == 1
    assert kept({"live": "takedown is None and width > 3", "art": "source_tags == 'art'"}) == 4


def test_every_rule_is_a_key_of_the_config() -> None:
    assert {rule.key for rule in RULES} == set(FilterConfig.model_fields) - {"where"}


def test_what_is_measured_goes_into_the_tables_and_what_is_rejected_is_counted(tmp_path: Path) -> None:
    files = {"sharp.jpg": photo(1), "flat.png": photo(2, format="PNG"), "small.jpg": photo(3), "unliked.jpg": photo(4)}
    Image.new("RGB", (48, 40), "gray").save(tmp_path / "flat.png")
    files["flat.png"] = (tmp_path / "flat.png").read_bytes()
    rows = [{"file_name": name, "text": name, "score": 0.1 if name == "unliked.jpg" else 0.9} for name in files]
    rows[2]["text"] = "tiny"
    folder = write_folder(tmp_path / "f", files, rows=rows)
    filters = {"min_sharpness": 0.5, "min_contrast": 5, "min_caption_characters": 5, "where": {"score": "score > 0.5"}}
    counts = prepare([str(folder)], out=tmp_path / "C", config=PrepareConfig.model_validate({"filters": filters}))
    assert counts.rejected == {"filter:min-caption-characters": 1, "filter:min-contrast": 1, "filter:score": 1}
    kept, flat = row_of(tmp_path / "C", "sharp.jpg"), row_of(tmp_path / "C", "flat.png")
    assert kept["sharpness"] > 0.5
    assert kept["contrast"] > 5
    assert (flat["contrast"], flat["sharpness"]) == (0, None)
    assert "filters.min_contrast=5" in flat["detail"]
    assert json.loads((tmp_path / "C/manifest.json").read_text())["config"]["filters"]["where"] == {"score": "score > 0.5"}
