"""The images of a preview, the order in which they are drawn, and the grid: a row for each prompt and size, a column for each number of
steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from PIL import Image

from launch.config.model_sections import PreviewConfig
from launch.sampling.image_grid import grid

LEFT_OUT = (225, 225, 225)  # colour in place of an image that was not drawn


@dataclass(frozen=True, slots=True)
class Cell:
    """One image: a prompt, or class, at a size in pixels, drawn in a number of steps."""

    prompt: str | int
    height: int
    width: int
    steps: int

    @property
    def cost(self) -> int:
        """Pixels that the network evaluates: proportional to the time that the image takes."""
        return self.height * self.width * self.steps


def cells_of(section: PreviewConfig) -> list[Cell]:
    """All images of a preview, row by row of its grid."""
    rows = product(section.prompts, section.pixel_sizes)
    return [Cell(prompt, height, width, steps) for prompt, (height, width) in rows for steps in section.steps]


def drawing_order(cells: Sequence[Cell]) -> list[int]:
    """Indices of the cells, those with the fewest steps first, then the smallest."""
    return sorted(range(len(cells)), key=lambda index: (cells[index].steps, cells[index].cost))


def preview_grid(cells: Sequence[Cell], drawn: Mapping[int, Image.Image]) -> Image.Image:
    """The grid of all cells, grey where an image is missing. `drawn`: images by the index of their cell."""
    columns = len({cell.steps for cell in cells})
    images = [drawn.get(index) or Image.new("RGB", (cell.width, cell.height), LEFT_OUT) for index, cell in enumerate(cells)]
    firsts = cells[::columns]
    names = [cell.prompt if isinstance(cell.prompt, str) else f"class {cell.prompt}" for cell in firsts]
    return grid(
        [images[first : first + columns] for first in range(0, len(cells), columns)],
        row_labels=[f"{name}\n{cell.width} x {cell.height}" for name, cell in zip(names, firsts, strict=True)],
        column_labels=[f"{cell.steps} step{'s' * (cell.steps > 1)}" for cell in cells[:columns]],
    )
