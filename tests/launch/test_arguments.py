"""What people type, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.arguments import (
    one_config,
    parse_borders,
    parse_interval,
    parse_scales,
    parse_seeds,
    parse_sizes,
    parse_steps,
    parse_times,
    split_overrides,
    split_sources,
)


def test_overrides_are_told_from_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "label=cat").mkdir()
    given_ = ["photos", "train.steps=3", "label=cat", "x/{000..009}.tar", "hf://datasets/a?b=c", "a/b=c", "seed=1", "text.note=a=b", "=x"]
    sources, overrides = split_overrides(given_)
    assert overrides == ["train.steps=3", "seed=1", "text.note=a=b"]
    assert sources == ["photos", "label=cat", "x/{000..009}.tar", "hf://datasets/a?b=c", "a/b=c", "=x"]


def test_a_config_may_stand_anywhere_among_overrides() -> None:
    assert one_config(["seed=1", "demo", "train.steps=3"]) == ("demo", ["seed=1", "train.steps=3"])
    with pytest.raises(ValueError, match="expected one CONFIG"):
        one_config(["seed=1"])
    with pytest.raises(ValueError, match="got demo photos"):
        one_config(["demo", "photos"])


def test_sizes_are_typed_width_first_and_kept_height_first() -> None:
    assert parse_sizes("512x128, 256X256,512×128") == [(128, 512), (256, 256)]


@pytest.mark.parametrize("text", ["", "512", "512x", "x5", "512x128,", "-1x5", "1.5x3", "0x64", "64x0", "100000x100000", "axb"])
def test_malformed_sizes_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"--size {text}"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["20000x1", "1x16385", "8x8,1x20000"])
def test_sides_that_are_too_long_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^--size {text}: (width|height) \d+: must be from 1 to 16384 pixels$"):
        parse_sizes(text)
    assert parse_sizes("16384x1024") == [(1024, 16384)]


def test_steps() -> None:
    assert parse_steps("1,2, 4,8,8") == [1, 2, 4, 8]
    for text in ("0", "-1", "1,0", "", "a", "1.5", "1;2"):
        with pytest.raises(ValueError, match="--steps"):
            parse_steps(text)


def test_times_and_intervals() -> None:
    assert parse_times("1, 0.6,0") == [1.0, 0.6, 0.0]
    assert parse_interval("0.2,0.7") == (0.2, 0.7)
    for text in ("1", "0,1", "1,1,0", "", "a,b", "nan,0", "1;0"):
        with pytest.raises(ValueError, match="--times"):
            parse_times(text)
    for text in ("0.7,0.2", "0.5", "-1,1", "0,2", "0,0.5,1", "a,b", "nan,1"):
        with pytest.raises(ValueError, match="--interval"):
            parse_interval(text)


def test_scales_seeds_and_borders() -> None:
    assert parse_scales("1, 2.5,1") == [1.0, 2.5]
    assert parse_scales("1,2.5,1", repeats=True) == [1.0, 2.5, 1.0]
    assert parse_seeds("0, 7,7") == [0, 7]
    assert parse_borders("64,0, 64,1") == (64, 0, 64, 1)
    for text in ("nan", "inf", "-1", "1e400", "x", "", "1,,2"):
        with pytest.raises(ValueError, match="--guidance"):
            parse_scales(text)
    for text in ("-1", "1.5", "x", "", "1,", "٣"):
        with pytest.raises(ValueError, match="--seed"):
            parse_seeds(text)
    for text in ("1,2,3", "1,2,3,-4", "1,2,3,4,5", "a,b,c,d", ""):
        with pytest.raises(ValueError, match="--extend"):
            parse_borders(text)


def test_sources_have_names_and_settings_have_dots() -> None:
    arguments = ["photos", "web=list.csv", "seed=1", "filters.min_side=64", "sources.web.tags=[a]", "art=s3://b/x?y=z", "x/{0..9}.tar"]
    assert split_sources(arguments, settings={"seed", "filters", "sources"}) == (
        ["photos", "web=list.csv", "art=s3://b/x?y=z", "x/{0..9}.tar"],
        ["seed=1", "filters.min_side=64", "sources.web.tags=[a]"],
    )
