"""`grid.png` of a folder of samples, and further pages `grid-002.png`, …

Rows are prompts and sizes, columns the numbers of steps, guidance scales and seeds that differ. With one image for each row, thumbnails
stand in reading order above their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from launch.sampling.files.formats import image_format
from launch.sampling.files.samples_file import Sample
from launch.sampling.files.settings import Settings
from launch.sampling.image_grid import grid_pages, sheet_pages
from pipeline.digests import json_digest
from pipeline.storage.atomic import publish

NAME = "grid.png"
_LONGEST_PROMPT = 150  # characters in a label

_Column: TypeAlias = "tuple[int | None, float | None, int | None]"  # steps, guidance, seed
_Row: TypeAlias = "tuple[str | int, int, int, str, str]"  # prompt, width, height, number of the prompt, digest of all that is no column


def write_grids(folder: Path, samples: Sequence[Sample]) -> list[Path]:
    """Write the grid of images in a folder, in any number of pages, atomically. Returns their paths; none without an image.

    Memory does not grow with the number of images. Raises OSError if a page cannot be written.
    """
    if not samples:
        return []
    rows: dict[_Row, dict[_Column, Path]] = {}
    for sample in samples:
        rows.setdefault(_row(sample), {}).setdefault(_column(sample.settings), folder / sample.file)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    labels = [_row_label(row) for row in rows]
    if len(columns) == 1 or all(len(row) == 1 for row in rows.values()):
        files = [path for row in rows.values() for path in row.values()]
        pages = sheet_pages(files, labels=labels)
    elif len(rows) == 1:
        (row,) = rows.values()
        pages = sheet_pages([row[column] for column in columns], labels=[f"{labels[0]}\n{each}" for each in _column_labels(columns)])
    else:
        cells = [[row.get(column) for column in columns] for row in rows.values()]
        pages = grid_pages(cells, row_labels=labels, column_labels=_column_labels(columns))
    written = []
    for number, page in enumerate(pages, start=1):
        path = folder / (NAME if number == 1 else f"grid-{number:03d}.png")
        with publish(path) as stream:
            page.save(stream, **image_format(path=path).save_options())
        written.append(path)
    return written


def _row(sample: Sample) -> _Row:
    """Prompts that come twice in a list stay apart by their number, with which names of files start."""
    settings = sample.settings
    rest = {name: value for name, value in settings.request().items() if name not in ("steps", "guidance", "seed")}
    return settings.prompt, settings.width, settings.height, _number(sample.file), json_digest(rest)


def _number(file: PurePosixPath) -> str:
    first = file.name.partition("-")[0]
    return first if first.isdigit() and len(file.parts) == 1 else ""


def _column(settings: Settings) -> _Column:
    steps = settings.steps if settings.times is None else len(settings.times) - 1
    return steps, settings.guidance, settings.seed


def _row_label(row: _Row) -> str:
    prompt, width, height, *_ = row
    name = prompt if isinstance(prompt, str) else f"class {prompt}"
    short = name if len(name) <= _LONGEST_PROMPT else f"{name[:_LONGEST_PROMPT]}…"
    return f"{short}\n{width} x {height}"


def _column_labels(columns: Sequence[_Column]) -> list[str]:
    """Steps, and guidance and seed where they differ."""
    guidances, seeds = ({column[place] for column in columns} for place in (1, 2))
    labels = []
    for steps, guidance, seed in columns:
        parts = [] if steps is None else [f"{steps} step{'s' * (steps > 1)}"]
        parts += [f"guidance {guidance:g}"] if len(guidances) > 1 and guidance is not None else []
        parts += [f"seed {seed}"] if len(seeds) > 1 and seed is not None else []
        labels.append(", ".join(parts))
    return labels
