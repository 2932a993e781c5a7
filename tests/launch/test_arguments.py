"""What people type, read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.arguments import (
    check_guidance,
    one_config,
    parse_interval,
    parse_sizes,
    parse_steps,
    parse_times,
    round_sizes,
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


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_guidance_nonsense(scale: float) -> None:
    with pytest.raises(ValueError, match="--guidance"):
        check_guidance(scale)


@given(height=st.integers(8, 5000), width=st.integers(8, 5000), stride=st.integers(1, 8))
def test_sizes_are_rounded_down_and_it_is_said(height: int, width: int, stride: int) -> None:
    ((rounded_height, rounded_width),), remarks = round_sizes([(height, width)], stride=stride)
    assert rounded_height % stride == rounded_width % stride == 0
    assert 0 <= height - rounded_height < stride
    assert 0 <= width - rounded_width < stride
    assert bool(remarks) == ((rounded_height, rounded_width) != (height, width))
    assert not remarks or f"{rounded_width}x{rounded_height}" in remarks[0]


def test_a_side_below_the_stride_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--size 64x8.*16 pixels"):
        round_sizes([(8, 64)], stride=16)


def test_sources_have_names_and_settings_have_dots() -> None:
    arguments = ["photos", "web=list.csv", "seed=1", "filters.min_side=64", "sources.web.tags=[a]", "art=s3://b/x?y=z", "x/{0..9}.tar"]
    assert split_sources(arguments, settings={"seed", "filters", "sources"}) == (
        ["photos", "web=list.csv", "art=s3://b/x?y=z", "x/{0..9}.tar"],
        ["seed=1", "filters.min_side=64", "sources.web.tags=[a]"],
    )
