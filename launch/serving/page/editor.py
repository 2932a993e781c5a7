"""The section "Change an image": image to image, inpainting by a painted mask, and outpainting.

The image and the mask stay in the browser, which paints at the image's own size, and come with the request. gradio's own editor needs
WebGL, encodes the image anew, and cannot be used by keyboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr
from gradio.components import Component

from launch.sampling.files.settings import Settings
from launch.serving.limits import Limits
from launch.serving.page.form import whole
from tim.sampling.edits import FEATHER

_TEMPLATE = """<div class="tim-editor" data-max-bytes="{max_bytes}" data-max-pixels="{max_pixels}">
<label class="tim-drop"><span>Drop an image here, or choose a file</span>
<input type="file" data-part="file" accept="image/png,image/jpeg,image/webp,image/avif" aria-label="Image to change"></label>
<p class="tim-hint" data-part="note" role="status"></p>
<div data-part="work" hidden>
<div class="tim-tools" role="group" aria-label="Painting">
<label><input type="radio" name="tim-tool" checked> Paint</label>
<label><input type="radio" name="tim-tool" data-part="erase"> Erase</label>
<label class="tim-brush">Brush <input type="range" min="1" max="256" value="32" data-part="size" aria-label="Brush size in pixels"></label>
<button type="button" class="tim-button" data-part="undo">Undo</button>
<button type="button" class="tim-button" data-part="clear">Clear mask</button>
<label><input type="checkbox" data-part="native"> Show at 100 %</label>
<button type="button" class="tim-button" data-part="remove">Remove image</button>
</div>
<div class="tim-frame" data-part="frame"><div class="tim-sheet"><img data-part="image" alt="The image to change">
<canvas data-part="mask" tabindex="0" aria-label="Mask: arrow keys move the brush, with Shift by one pixel; Space paints"></canvas>
<div class="tim-ring" data-part="ring"></div></div></div>
<p class="tim-hint">Paint what is to be drawn anew. By keyboard: arrow keys move
the brush, with Shift by one pixel; Space paints.</p>
</div></div>"""


@dataclass(frozen=True, slots=True)
class Editor:
    """The controls of the section. image and mask are filled by the browser when a request is sent."""

    image: Component
    mask: Component
    left: Component
    top: Component
    right: Component
    bottom: Component
    strength: Component
    feather: Component

    def controls(self) -> list[Component]:
        """All of them, in order; image and mask first."""
        return [getattr(self, field.name) for field in fields(self)]


def build_editor(limits: Limits) -> Editor:
    """The section, within the column in hand."""
    template = _TEMPLATE.format(max_bytes=limits.max_upload, max_pixels=limits.max_pixels)
    gr.HTML(html_template=template, js_on_load="timEditor.start(element)", apply_default_css=False, elem_id="tim-editor")
    hint = "Outpainting: pixels to add at each side, drawn anew. Not together with a mask."
    gr.HTML(f'<p class="tim-hint">{hint}</p>', apply_default_css=False)
    with gr.Row(elem_classes="tim-quarters", equal_height=True):
        left, top, right, bottom = (gr.Number(0, label=side, min_width=60) for side in ("Left", "Top", "Right", "Bottom"))
    with gr.Row(elem_classes="tim-pair"):
        strength = gr.Textbox("", label="Strength", info="up to 1; empty: 0.6, with a mask 1", max_lines=1, min_width=80)
        feather = gr.Number(FEATHER, label="Feather", info="soft pixels inside the mask", min_width=80)
    image, mask = gr.Textbox(visible=False), gr.Textbox(visible=False)
    return Editor(image, mask, left, top, right, bottom, strength, feather)


def request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section's part of a `DrawRequest`; empty without an image. Raises ValueError for a strength that is no number."""
    if not values["image"]:
        return {}
    borders = [whole(values[side]) or 0 for side in ("left", "top", "right", "bottom")]
    return {
        "image": values["image"],
        "mask": values["mask"] or None,
        "extend": borders if any(borders) else None,
        "strength": _strength(values["strength"]),
        "feather": FEATHER if values["feather"] is None else whole(values["feather"]),
    }


def updates_of(settings: Settings) -> list[Any]:
    """New values of the controls after image and mask, which are files of the user's."""
    feather = FEATHER if settings.feather is None else settings.feather
    strength = "" if settings.strength is None else f"{settings.strength:g}"
    return [*(settings.extend or (0, 0, 0, 0)), strength, feather]


def _strength(text: str | None) -> float | None:
    if not (text or "").strip():
        return None
    try:
        return float(str(text))
    except ValueError:
        raise ValueError(f"strength {text!r:.40}: give a number above 0 and up to 1, or leave it empty") from None
