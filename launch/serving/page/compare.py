"""The section "Compare": a labelled grid of steps × guidance × sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import gradio as gr
from gradio.components import Component

from launch.arguments import parse_scales, parse_sizes, parse_steps
from launch.sampling.image_grid import grid
from launch.serving.jobs import Result
from launch.serving.limits import Limits
from launch.serving.page.results import cards
from launch.serving.page.texts import data_url

_LOSSLESS = 2_000_000  # pixels of a grid up to which it is a PNG
_OPTION = re.compile(r"--[a-z]+")  # the command's name of a list, in messages

T = TypeVar("T")


class Compare(NamedTuple):
    """The controls of the section."""

    steps: Component
    guidance: Component
    sizes: Component
    draw: gr.Button

    def lists(self) -> list[Component]:
        """The lists, in order."""
        return [self.steps, self.guidance, self.sizes]


def build_compare(limits: Limits, *, prompt: str) -> Compare:
    """The section, within the column in hand. prompt: how the page calls it."""
    text = (
        f"Every combination is drawn with the {prompt} and the seed above, up to {limits.max_count} images. An empty list: the value above."
    )
    gr.HTML(f'<p class="tim-hint">{text}</p>', apply_default_css=False, elem_classes="tim-plain")
    steps = gr.Textbox("1, 2, 4, 8", label="Steps", info="columns", max_lines=1)
    guidance = gr.Textbox("1, 2", label="Guidance", info="rows", max_lines=1)
    sizes = gr.Textbox("", label="Sizes", info="rows, such as 64x48, 48x64", max_lines=1)
    return Compare(steps, guidance, sizes, gr.Button("Draw the grid", elem_id="tim-compare"))


def request_fields(values: Mapping[str, Any], *, is_edit: bool) -> dict[str, Any]:
    """What the lists change in a request. Raises ValueError for a list that cannot be read, and for sizes of an image to change."""
    changes: dict[str, Any] = {"count": 1}
    if (values["steps"] or "").strip():
        changes["steps"] = _parsed(parse_steps, values["steps"], named="Steps")
    if (values["guidance"] or "").strip():
        changes["guidance"] = _parsed(parse_scales, values["guidance"], named="Guidance")
    if (values["sizes"] or "").strip():
        if is_edit:
            raise ValueError("Sizes: the image to change has its own size; leave the sizes empty, or remove the image")
        sizes = _parsed(parse_sizes, values["sizes"], named="Sizes")
        changes |= {
            "sizes": [[width, height] for height, width in sizes],
            "width": None,
            "height": None,
            "aspect": None,
            "megapixels": None,
        }
    return changes


def grid_of(results: Sequence[Result]) -> str:
    """The grid and its images as HTML: columns are steps, rows are sizes and guidance scales."""
    cells = {(*_row(result), result.settings.steps): result for result in results}
    rows = list(dict.fromkeys(map(_row, results)))
    columns = list(dict.fromkeys(result.settings.steps for result in results))
    image = grid(
        [[cells[(*row, steps)].image for steps in columns] for row in rows],
        row_labels=[f"{width} × {height}\nguidance {guidance:g}" for width, height, guidance in rows],
        column_labels=[f"{steps} step{'s' * (steps != 1)}" for steps in columns],
    )
    is_small = image.width * image.height <= _LOSSLESS
    url, name = data_url(image, lossless=is_small), "grid.png" if is_small else "grid.jpg"
    text = f"{len(rows)} × {len(columns)} images: steps across, sizes and guidance down"
    return f"""<figure class="tim-grid"><img src="{url}" alt="Grid of {text}" width="{image.width}" height="{image.height}">
<div class="tim-actions"><a class="tim-button" href="{url}" download="{name}">Download the grid</a></div></figure>
<details class="tim-singles"><summary>The {len(results)} images at their exact sizes</summary>{cards(results)}</details>"""


def _row(result: Result) -> tuple[int, int, float]:
    return result.settings.width, result.settings.height, result.settings.guidance or 0.0


def _parsed(parse: Callable[[str], list[T]], text: str, *, named: str) -> list[T]:
    """A list by a parser of the command line, with the control's name in its messages."""
    try:
        return parse("".join(text.split()))
    except ValueError as error:
        raise ValueError(_OPTION.sub(named, str(error))) from None
