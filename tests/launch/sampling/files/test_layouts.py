"""Folders of benchmarks, read as the official evaluators read them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from PIL import Image

from launch.sampling.files.formats import image_format
from launch.sampling.files.image_files import write_image
from launch.sampling.files.layouts import LAYOUTS, distinct_rows, layout
from launch.sampling.files.settings import Settings
from launch.sampling.prompts.prompt_files import read_prompts
from launch.sampling.prompts.requests import Request, expand
from launch.sampling.prompts.rows import PromptRow

COLOURS = ("red", "lime", "blue", "yellow")
SQUARE = [(16, 16)]


def drawn(name: str, out: Path, rows: Sequence[PromptRow], *, form: str = "png", **options: Any) -> list[PurePosixPath]:
    """Write a plain image for each request of a layout. Returns their files."""
    chosen = layout(name)
    requests = expand(rows, sizes=SQUARE, **{"count": chosen.count, **options})
    paths = chosen.paths(requests, form=image_format(form))
    chosen.begin(out, requests)
    for request, path in zip(requests, paths, strict=True):
        image = Image.new("RGB", (request.width, request.height), COLOURS[request.repeat % 4])
        write_image(out / path, image, settings_of(request), form=image_format(form))
    chosen.finish(out, requests, paths)
    return paths


def settings_of(request: Request) -> Settings:
    return Settings(prompt=request.prompt, width=request.width, height=request.height, seed=request.seed)


def rows_of(path: Path, content: str, name: str) -> list[PromptRow]:
    path.write_text(content)
    remarks: list[str] = []
    rows = distinct_rows(list(read_prompts(str(path), known=LAYOUTS[name].columns, log=remarks.append)))
    assert not remarks, remarks
    return rows


def refused(name: str, rows: Sequence[PromptRow], message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(name, Path("/nowhere"), rows, **options)


def test_geneval(tmp_path: Path, shared: Path) -> None:
    """evaluation/evaluate_images.py: folders of digits with `metadata.jsonl`, one JSON value, and `samples/` with digits and .png."""
    source = shared / "prompts" / "geneval.jsonl"
    lines = source.read_text().splitlines()
    rows = rows_of(tmp_path / "prompts.jsonl", "\n".join(lines[:3]), "geneval")
    drawn("geneval", tmp_path / "out", rows)
    folders = [folder for folder in sorted(os.listdir(tmp_path / "out")) if folder.isdigit()]
    assert folders == ["00000", "00001", "00002"]
    for folder, line in zip(folders, lines, strict=False):
        with open(tmp_path / "out" / folder / "metadata.jsonl") as stream:
            assert json.load(stream) == json.loads(line)
        images = sorted(os.listdir(tmp_path / "out" / folder / "samples"))
        assert images == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert all(re.match(r"\d+\.png", image) for image in images)


def test_geneval_needs_its_rows_and_png() -> None:
    refused("geneval", [PromptRow("a", "list, line 1")], "list, line 1: has no keys tag and include")
    refused("geneval", [PromptRow("a", "list, line 1")], "its evaluator reads png", form="jpeg")
    refused("geneval", [PromptRow("a", "list, line 1")], "give one size, number of steps and guidance scale", steps=[1, 2], count=1)


def test_geneval2(tmp_path: Path) -> None:
    """evaluation.py: `{prompt: path}` as JSON, with the prompts of its data."""
    row = {"prompt": "four bicycles", "atom_count": 7, "vqa_list": [["How many?", "four"]], "skills": ["count"]}
    rows = rows_of(tmp_path / "geneval2_data.jsonl", json.dumps(row) + "\n" + json.dumps({**row, "prompt": "a cow"}), "geneval2")
    drawn("geneval2", tmp_path / "out", rows, count=2, form="webp")
    paths = json.loads((tmp_path / "out" / "geneval2.json").read_text())
    assert list(paths) == ["four bicycles", "a cow"]
    assert [Path(path).relative_to(tmp_path / "out") for path in paths.values()] == [Path("images/00000.webp"), Path("images/00001.webp")]
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths.values())


@pytest.mark.parametrize("count", [1, 3, 4])
def test_dpg(tmp_path: Path, count: int) -> None:
    """dpg_bench/compute_dpg_bench.py: every file is an image named by its item_id, cropped to squares of --resolution."""
    (tmp_path / "prompts").mkdir()
    for name in ("whoops1", "COCOval2014000000000042"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a prompt of {name}")
    rows = list(read_prompts(str(tmp_path / "prompts"), log=print))
    drawn("dpg", tmp_path / "out", rows, count=count)
    files = sorted(os.listdir(tmp_path / "out" / "images"))
    assert [file.split(".")[0] for file in files] == ["COCOval2014000000000042", "whoops1"]
    crops = [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)]
    for file in files:
        with Image.open(tmp_path / "out" / "images" / file) as image:
            assert image.size == ((16, 16) if count == 1 else (32, 32))
            for crop, colour in zip(crops[:count], COLOURS, strict=False):
                assert image.crop(crop).getcolors() == [(256, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]


def test_the_table_of_dpg_has_each_prompt_once(tmp_path: Path) -> None:
    header = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
    rest = "entity,whole,entity - whole (fox),Is there a fox?"
    table = "\n".join([header, f"a1,a fox,fox,1,0,{rest}", f"a1,a fox,fox,2,1,{rest}", f"b2,a lake,lake,1,0,{rest}", ""])
    rows = rows_of(tmp_path / "dpg_bench.csv", table, "dpg")
    assert [(row.id, row.prompt) for row in rows] == [("a1", "a fox"), ("b2", "a lake")]
    with pytest.raises(ValueError, match=r"line 5: id b2 has another prompt in .*, line 4"):
        rows_of(tmp_path / "dpg_bench.csv", table + f"b2,a sea,lake,1,0,{rest}", "dpg")


def test_dpg_names_what_its_evaluator_does_not_read() -> None:
    row = PromptRow("a", "list, line 1", id="a")
    refused("dpg", [PromptRow("a", "list, line 1")], "list, line 1: has no key id")
    refused("dpg", [PromptRow("a", "list, line 1", id="a.b")], "has a dot")
    refused("dpg", [PromptRow("a", "list, line 1", id="../a")], "list, line 1: '../a' as the name of a file")
    refused("dpg", [row], "more than 4 images", count=5)
    refused("dpg", [PromptRow("a", "list, line 1", id="a", size=(16, 32))], "squares of one size")
    refused("dpg", [row, PromptRow("a", "list, line 2", id="b", size=(32, 32))], "squares of one size")
    refused("dpg", [row, PromptRow("b", "list, line 2", id="A")], "two images have the name samples/A/0000.png")


def test_mjhq(tmp_path: Path) -> None:
    """MJHQ-30K: meta_data.json is {ID: {category, prompt}}, its images are CATEGORY/ID.jpg."""
    content = {"0a1b": {"category": "animals", "prompt": "a fox"}, "9f": {"category": "landscape", "prompt": "a lake"}}
    rows = rows_of(tmp_path / "meta_data.json", json.dumps(content), "mjhq")
    assert drawn("mjhq", tmp_path / "out", rows, form="jpeg") == [
        PurePosixPath("images/animals/0a1b.jpg"),
        PurePosixPath("images/landscape/9f.jpg"),
    ]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["0a1b.jpg", "9f.jpg"]
    refused("mjhq", [PromptRow("a", "list, line 1", id="a")], "list, line 1: has no key category")
    refused("mjhq", [PromptRow("a", "list, line 1", id="a", record={"category": "a/b"})], "'a/b' as the name of a file")
    refused("mjhq", rows, "more than one image; use --count 1", count=2)


def test_unknown_layouts_are_named() -> None:
    with pytest.raises(ValueError, match="--layout coco: expected geneval, geneval2, dpg or mjhq"):
        layout("coco")
