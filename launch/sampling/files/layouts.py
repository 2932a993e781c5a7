"""Folders of images as the official evaluators of benchmarks read them.

| layout | prompts | images | given to the evaluator |
| --- | --- | --- | --- |
| `geneval` | `evaluation_metadata.jsonl` | `00000/samples/0000.png`, and the row in `00000/metadata.jsonl` | the folder |
| `geneval2` | `geneval2_data.jsonl` | `images/00000.png`, the first of each prompt in `geneval2.json` | `geneval2.json`: {prompt: path} |
| `dpg` | the folder of `ITEM_ID.txt`, or `dpg_bench.csv` | `samples/ITEM_ID/0000.png`, 2 × 2 of them in `images/ITEM_ID.png` | `images/` |
| `mjhq` | `meta_data.json` | `images/CATEGORY/ID.png` | `images/` |

Sources: djghosh13/geneval evaluation/evaluate_images.py (folders of digits, samples of digits and `.png`); facebookresearch/GenEval2
evaluation.py; TencentQQGYLab/ELLA dpg_bench/compute_dpg_bench.py (every file of the folder is an image, cropped at --resolution);
playgroundai/MJHQ-30K.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from launch.sampling.files.formats import ImageFormat, image_format
from launch.sampling.files.names import check_distinct, check_file_name
from launch.sampling.prompts.requests import Request
from launch.sampling.prompts.rows import PromptRow
from pipeline.storage.atomic import publish, publish_text

IMAGES, SAMPLES = "images", "samples"
GENEVAL2_FILE = "geneval2.json"
DPG_IMAGES = 4  # of a prompt, at most


@dataclass(frozen=True, slots=True)
class Layout:
    """How a benchmark names its images.

    columns: keys of prompt rows that it uses. count: its usual number of images for a prompt. path: the file of an image, without suffix.
    begin, finish: write what the evaluator needs besides the images, before and after they are drawn.
    """

    name: str
    columns: frozenset[str]
    count: int
    path: Callable[[Request], PurePosixPath]
    begin: Callable[[Path, Sequence[Request]], None]
    finish: Callable[[Path, Sequence[Request], Sequence[PurePosixPath]], None]
    is_png: bool = False
    is_square: bool = False

    def paths(self, requests: Sequence[Request], *, form: ImageFormat) -> list[PurePosixPath]:
        """The file of each image, in the folder of the layout.

        Raises:
            ValueError: a prompt has several sizes, steps or guidance scales, or more images than the layout can hold; a row has no id, or
                that of another one; the evaluator does not read the format or sizes.
        """
        if self.is_png and form.name != "png":
            raise ValueError(f"--layout {self.name}: its evaluator reads png; use --format png")
        sizes = {(request.height, request.width) for request in requests}
        if self.is_square and (len(sizes) > 1 or any(height != width for height, width in sizes)):
            raise ValueError(f"--layout {self.name}: its evaluator crops squares of one size; give one --size with equal sides")
        settings: dict[int, tuple[object, ...]] = {}
        for request in requests:
            values = (request.height, request.width, request.steps, request.guidance)
            if settings.setdefault(request.index, values) != values:
                raise ValueError(f"--layout {self.name}: give one size, number of steps and guidance scale, and the others another --out")
        paths = [self.path(request).with_suffix(form.suffix) for request in requests]
        check_distinct(paths)
        return paths


def layout(name: str) -> Layout:
    """The layout of `--layout NAME`. Raises ValueError for an unknown one."""
    if name not in LAYOUTS:
        raise ValueError(f"--layout {name}: expected {', '.join(list(LAYOUTS)[:-1])} or {list(LAYOUTS)[-1]}")
    return LAYOUTS[name]


def distinct_rows(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The prompts of a benchmark, each id once: `dpg_bench.csv` has a row for each question.

    Raises:
        ValueError: two rows have the same id and different prompts.
    """
    found: dict[str, PromptRow] = {}
    kept: list[PromptRow] = []
    for row in rows:
        first = row if row.id is None else found.setdefault(row.id, row)
        if first.prompt != row.prompt:
            raise ValueError(f"{row.place}: id {row.id} has another prompt in {first.place}; give each prompt its own id")
        if first is row:
            kept.append(row)
    return kept


def _geneval_path(request: Request) -> PurePosixPath:
    return PurePosixPath(f"{request.index:05d}", SAMPLES, f"{request.repeat:04d}.png")


def _geneval_begin(out: Path, requests: Sequence[Request]) -> None:
    """Write each prompt's row to its folder."""
    for request in (request for request in requests if request.repeat == 0):
        record = request.row.record
        if "tag" not in record or "include" not in record:
            raise ValueError(f"{request.row.place}: has no keys tag and include; --layout geneval needs rows of evaluation_metadata.jsonl")
        folder = out / f"{request.index:05d}"
        (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        publish_text(folder / "metadata.jsonl", json.dumps(dict(record)))


def _geneval2_path(request: Request) -> PurePosixPath:
    name = f"{request.index:05d}" + (f"-{request.repeat:04d}" if request.repeat else "")
    return PurePosixPath(IMAGES, f"{name}.png")


def _geneval2_finish(out: Path, requests: Sequence[Request], paths: Sequence[PurePosixPath]) -> None:
    """Write the absolute path of each prompt's first image: the evaluator opens them from its own folder."""
    pairs = zip(requests, paths, strict=True)
    found = {str(request.prompt): str((out / path).resolve()) for request, path in pairs if request.repeat == 0}
    publish_text(out / GENEVAL2_FILE, json.dumps(found, indent=1) + "\n")


def _dpg_path(request: Request) -> PurePosixPath:
    if request.repeat >= DPG_IMAGES:
        raise ValueError(f"--layout dpg: {request.row.place} has more than {DPG_IMAGES} images; use --count {DPG_IMAGES}")
    if "." in (name := _id(request)):
        raise ValueError(f"{request.row.place}: id {name} has a dot, where DPG-Bench ends the id of a file; rename it")
    return PurePosixPath(SAMPLES, name, f"{request.repeat:04d}.png")


def _dpg_finish(out: Path, requests: Sequence[Request], paths: Sequence[PurePosixPath]) -> None:
    """Write a file for each prompt: its image, or up to four in two columns. Holds one prompt's images in memory."""
    prompts: dict[int, list[tuple[Request, PurePosixPath]]] = {}
    for request, path in zip(requests, paths, strict=True):
        prompts.setdefault(request.index, []).append((request, path))
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    for images in prompts.values():
        first, path = images[0]
        side = 1 if len(images) == 1 else 2
        canvas = Image.new("RGB", (side * first.width, side * first.height))
        for number, (_, path) in enumerate(images):
            with Image.open(out / path) as image:
                canvas.paste(image, (number % 2 * first.width, number // 2 * first.height))
        form = image_format(path=Path(path.name))
        with publish(out / IMAGES / f"{_id(first)}{form.suffix}") as stream:
            canvas.save(stream, **form.save_options())


def _mjhq_path(request: Request) -> PurePosixPath:
    category = request.row.record.get("category")
    if not isinstance(category, str):
        raise ValueError(f"{request.row.place}: has no key category; --layout mjhq needs rows of meta_data.json")
    if request.repeat:
        raise ValueError(f"--layout mjhq: {request.row.place} has more than one image; use --count 1")
    return PurePosixPath(IMAGES, _checked(category, request.row), f"{_id(request)}.png")


def _id(request: Request) -> str:
    if request.row.id is None:
        raise ValueError(f"{request.row.place}: has no key id (or item_id), which names its image in this layout")
    return _checked(request.row.id, request.row)


def _checked(name: str, row: PromptRow) -> str:
    try:
        return check_file_name(name)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from error


def _begin_nothing(out: Path, requests: Sequence[Request]) -> None:
    """No files before the images."""


def _finish_nothing(out: Path, requests: Sequence[Request], paths: Sequence[PurePosixPath]) -> None:
    """No files after the images."""


_GENEVAL_COLUMNS = frozenset({"tag", "include", "exclude"})
_GENEVAL2_COLUMNS = frozenset({"atom_count", "vqa_list", "skills"})
_DPG_COLUMNS = frozenset(
    {"keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple", "question_natural_language"}
)
LAYOUTS = {
    each.name: each
    for each in (
        Layout("geneval", _GENEVAL_COLUMNS, 4, _geneval_path, _geneval_begin, _finish_nothing, is_png=True),
        Layout("geneval2", _GENEVAL2_COLUMNS, 1, _geneval2_path, _begin_nothing, _geneval2_finish),
        Layout("dpg", _DPG_COLUMNS, DPG_IMAGES, _dpg_path, _begin_nothing, _dpg_finish, is_square=True),
        Layout("mjhq", frozenset({"category"}), 1, _mjhq_path, _begin_nothing, _finish_nothing),
    )
}
