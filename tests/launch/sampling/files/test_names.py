"""Names of images, and what is drawn, skipped or refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from launch.sampling.files.formats import image_format
from launch.sampling.files.image_files import write_image
from launch.sampling.files.names import check_distinct, check_file_name, decide, file_name, plan_images, slug
from launch.sampling.files.settings import MAX_SEED, Settings
from tests.launch.sampling.files.test_settings import FULL

SMALL = Settings(prompt="a red fox", width=512, height=128, steps=8, guidance=2.5, seed=0)


def name(asked: Settings, index: int = 3) -> str:
    return file_name(asked, index=index, suffix=".png")


def written(path: Path, asked: Settings, *, metadata: bool = True) -> Path:
    write_image(path, Image.new("RGB", (8, 8)), asked, form=image_format(path=path), metadata=metadata)
    return path


def test_the_name_tells_the_settings() -> None:
    assert name(SMALL).startswith("0003-a-red-fox-512x128-steps8-cfg2.5-seed0-")
    assert name(SMALL) == name(replace(SMALL, device="cuda", torch_version="2.13"))
    assert name(replace(SMALL, prompt=7)).startswith("0003-class-7-")
    assert name(replace(SMALL, times=(1.0, 0.0))).startswith("0003-a-red-fox-512x128-steps1-")


def test_other_settings_have_other_names() -> None:
    changes = [
        {"prompt": "A red fox"},
        {"prompt": "a red fox!"},
        {"guidance": 2.5000001},
        {"negative": ""},
        {"negative": "a dog"},
        {"interval": (0.1, 0.9)},
        {"times": (1.0, 0.5, 0.25, 0.2, 0.15, 0.1, 0.05, 0.01, 0.0)},
        {"stochasticity": 0.1},
        {"model_digest": "ab"},
        {"loras": FULL.loras},
        {"dtype": "bf16"},
        {"init_image": "ab"},
    ]
    names = [name(SMALL), name(SMALL, index=4), *(name(replace(SMALL, **change)) for change in changes)]
    assert len({each.casefold() for each in names}) == len(names)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("😀🦊", "symbols"),
        ("../../etc/passwd", "etc-passwd"),
        ("CON", "con"),
        ("Straße, München", "strasse-münchen"),
        ("赤い狐", "赤い狐"),
        ("a" * 20_000, "a" * 40),
        ("狐" * 100, "狐" * 26),
        ("-\0-", "symbols"),
    ],
)
def test_slugs(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=400))
def test_any_prompt_gives_a_name_that_every_file_system_takes(prompt: str) -> None:
    found = name(replace(SMALL, prompt=prompt, seed=MAX_SEED, steps=10**6, width=4096, height=4096), index=10**6)
    assert len(os.fsencode(found)) <= 255 - 80  # room for the suffix of a temporary file
    assert found == found.casefold()
    assert not set(found) & set('<>:"/\\|?*\0\n')


@pytest.mark.parametrize("bad", ["", " ", ".", "..", "a/b", "a\\b", "C:", "nul", "COM1.png", "a.", "a ", ".hidden", "a\nb", "x" * 200])
def test_names_of_lists_that_are_no_file_names_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="as the name of a file"):
        check_file_name(bad)


def test_names_of_lists() -> None:
    for good in ("COCOval2014000000000042", "animals", "0a1b", "конь", "con-1"):
        assert check_file_name(good) == good


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif"])
def test_an_image_is_drawn_skipped_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    assert decide(path, SMALL) == "draw"
    written(path, SMALL)
    assert decide(path, SMALL) == "skip"
    assert decide(path, replace(SMALL, device="cuda")) == "skip"
    assert decide(path, replace(SMALL, seed=1)) == "refuse"
    assert decide(path, replace(SMALL, seed=1), overwrite=True) == "draw"
    assert decide(path, SMALL, overwrite=True) == "draw"
    path.write_bytes(path.read_bytes()[:-3])
    assert decide(path, SMALL) in ("draw", "refuse")  # AVIF needs its end to be opened


def test_a_file_without_settings_is_refused_unless_they_are_recorded(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", SMALL, metadata=False)
    assert decide(path, SMALL) == "refuse"
    assert decide(path, SMALL, recorded=SMALL) == "skip"
    assert decide(path, SMALL, recorded=FULL) == "refuse"
    (tmp_path / "folder.png").mkdir()
    assert decide(tmp_path / "folder.png", SMALL, overwrite=True) == "refuse"


def test_a_list_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    images = {tmp_path / name(replace(SMALL, seed=seed)): replace(SMALL, seed=seed) for seed in range(5)}
    first, second, *rest = images
    written(first, images[first])
    written(second, images[second], metadata=False)
    assert plan_images(images, recorded={second: images[second]}) == rest
    assert plan_images(images, overwrite=True) == list(images)
    with pytest.raises(ValueError, match=r"seed1-\w+\.png exists with other settings or none: give another --out, or --overwrite"):
        plan_images(images)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_images_of_one_name_are_named() -> None:
    check_distinct([Path("a"), Path("b")])
    with pytest.raises(ValueError, match="two images have the name A"):
        check_distinct([Path("a"), Path("A")])
