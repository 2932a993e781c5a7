"""Grids of the images of a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image

from launch.sampling import image_grid
from launch.sampling.files.grids import write_grids
from launch.sampling.files.samples_file import Sample
from launch.sampling.files.settings import Settings
from launch.sampling.image_grid import sheet_pages


def sample(folder: Path, name: str, settings: Settings, colour: str = "red") -> Sample:
    Image.new("RGB", (settings.width, settings.height), colour).save(folder / name)
    return Sample(PurePosixPath(name), settings, {})


def blocks(path: Path, colour: str) -> int:
    """Number of pixels of a colour."""
    with Image.open(path) as image:
        wanted = np.asarray(Image.new("RGB", (1, 1), colour))
        return int((np.asarray(image.convert("RGB")) == wanted).all(axis=2).sum())


def test_steps_are_columns_and_prompts_rows(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, f"{index:04d}-{steps}.png", Settings(prompt=prompt, width=200, height=100, steps=steps, seed=0), colour)
        for index, prompt in enumerate(["a fox", "a lake"])
        for steps, colour in ((1, "red"), (4, "blue"))
    ]
    assert write_grids(tmp_path, samples) == [tmp_path / "grid.png"]
    assert blocks(tmp_path / "grid.png", "red") == blocks(tmp_path / "grid.png", "blue") == 2 * 200 * 100
    assert write_grids(tmp_path, samples[:-1]) == [tmp_path / "grid.png"]
    assert blocks(tmp_path / "grid.png", "blue") == 200 * 100  # the last cell is grey


def test_no_image_hides_another(tmp_path: Path) -> None:
    """Two prompts that are equal, and settings that are no column."""
    one = Settings(prompt="a fox", width=160, height=160, steps=1, seed=0)
    others = [Settings(prompt="a fox", width=160, height=160, steps=1, seed=0, negative=text) for text in ("a", "b")]
    samples = [sample(tmp_path, f"000{number}-a.png", settings) for number, settings in enumerate([one, one, *others])]
    write_grids(tmp_path, samples)
    assert blocks(tmp_path / "grid.png", "red") == 4 * 160 * 160


def test_many_images_go_on_on_further_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_grid, "PER_PAGE", 6)
    monkeypatch.setattr(image_grid, "COLUMNS", 3)
    prompts = [sample(tmp_path, f"{n:04d}.png", Settings(prompt=f"p{n}", width=16, height=16, steps=1)) for n in range(14)]
    pages = write_grids(tmp_path, prompts)
    assert [page.name for page in pages] == ["grid.png", "grid-002.png", "grid-003.png"]
    assert [blocks(page, "red") // 160**2 for page in pages] == [6, 6, 2]

    seeds = [sample(tmp_path, f"0-{n}.png", Settings(prompt="p", width=16, height=16, steps=1, seed=n)) for n in range(5)]
    more = [sample(tmp_path, f"1-{n}.png", Settings(prompt="q", width=16, height=16, steps=1, seed=n)) for n in range(5)]
    pages = write_grids(tmp_path, [*seeds, *more])
    assert [blocks(page, "red") // 160**2 for page in pages] == [6, 4]


def test_missing_files_and_nothing(tmp_path: Path) -> None:
    assert write_grids(tmp_path, []) == []
    there = sample(tmp_path, "a.png", Settings(prompt="p", width=160, height=160))
    gone = Sample(PurePosixPath("gone.png"), Settings(prompt="q", width=160, height=160), {})
    write_grids(tmp_path, [there, gone])
    assert blocks(tmp_path / "grid.png", "red") == 160 * 160
    (page,) = sheet_pages([None], labels=["nothing"])
    assert page.width > 256


@pytest.mark.parametrize("prompt", ["", "😀" * 20_000, "x" * 20_000, "a\n" * 5000, "\0\t\x1b", 7, "class"])
def test_labels_of_any_prompt_stay_small(tmp_path: Path, prompt: str | int) -> None:
    settings = [Settings(prompt=prompt, width=160, height=160, steps=steps) for steps in (1, 2)]
    samples = [sample(tmp_path, f"{number}.png", each) for number, each in enumerate(settings)]
    for shown in (samples, samples[:1]):
        write_grids(tmp_path, shown)
        with Image.open(tmp_path / "grid.png") as image:
            assert max(image.size) < 800
        assert blocks(tmp_path / "grid.png", "red") == len(shown) * 160 * 160


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Eight whole images would take 216 MB."""
    Image.new("RGB", (3000, 3000)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys; from pathlib import Path; from launch.sampling.image_grid import grid_pages\n"
        "def peak(count):\n"
        "    list(grid_pages([[Path(sys.argv[1])] * count], row_labels=['r'], column_labels=['c'] * count))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(peak(1), peak(8))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True, timeout=300, check=True)
    one, eight = map(int, done.stdout.split())
    assert eight - one < 80_000  # kB
