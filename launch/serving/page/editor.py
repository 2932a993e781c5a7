"""The section "Change an image": image to image, inpainting by a painted mask, and outpainting.

The image and the mask stay in the browser, which paints at the image's own size, and come with the request. gradio's own editor needs
WebGL, encodes the image anew, and cannot be used by keyboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

from launch.sampling.files.settings import Settings
from launch.serving.limits import Limits
from launch.serving.page.form import whole
from tim.sampling.edits import FEATHER

_TEMPLATE = """<div class="tim-editor" data-max-bytes="{max_bytes}" data-max-pixels="{max_pixels}" data-max-side="{max_side}">
<label class="tim-drop"><span>Drop an image here, or choose a file</span>
<input type="file" data-part="file" accept="image/png,image/jpeg,image/webp,image/avif" aria-label="Image to change"></label>
<p class="tim-hint" data-part="note" role="status"></p>
<div data-part="work" hidden>
<div class="tim-tools" role="group" aria-label="Painting">
<label><input type="radio" name="tim-tool" checked> Paint</label>
<label><input type="radio" name="tim-tool" data-part="erase"> Erase</label>
<label class="tim-brush">Brush <input type="range" min="1" max="256" value="32" data-part="size" aria-label="Brush size in pixels">
<output data-part="brush"></output></label>
</div>
<div class="tim-tools" role="group" aria-label="Mask">
<button type="button" class="tim-button" data-part="undo">Undo</button>
<button type="button" class="tim-button" data-part="redo">Redo</button>
<button type="button" class="tim-button" data-part="invert">Invert mask</button>
<button type="button" class="tim-button" data-part="clear">Clear mask</button>
</div>
<div class="tim-frame"><div class="tim-sheet" data-part="sheet"><div class="tim-art" data-part="art"><img data-part="image"
alt="The image to change"><div class="tim-ring" data-part="ring"></div></div></div></div>
<div class="tim-tools">
<label><input type="checkbox" data-part="native"> Show at 100 %</label>
<button type="button" class="tim-button" data-part="remove">Remove image</button>
</div>
<p class="tim-hint">Paint what is to be drawn anew. By keyboard: arrow keys move the brush, with Shift by one pixel; Space paints,
Ctrl+Z and Ctrl+Y undo and redo.</p>
</div></div>"""


class Editor(NamedTuple):
    """The controls of the section. image, mask and key are filled by the browser when a request is sent.

    key: names the image, which is sent once. The server answers with the key of the image that it has.
    """

    image: Component
    mask: Component
    key: Component
    left: Component
    top: Component
    right: Component
    bottom: Component
    strength: Component
    feather: Component


HIDDEN = 3  # controls of an editor that only the browser fills


def build_editor(limits: Limits) -> Editor:
    """The section, within the column in hand."""
    template = _TEMPLATE.format(max_bytes=limits.max_upload, max_pixels=limits.max_pixels, max_side=limits.max_side)
    gr.HTML(html_template=template, js_on_load="timEditor.start(element)", apply_default_css=False, elem_id="tim-editor")
    hint = "Outpainting: pixels to add at each side, drawn anew. Not together with a mask."
    gr.HTML(f'<p class="tim-hint">{hint}</p>', apply_default_css=False, elem_classes="tim-plain")
    with gr.Row(elem_classes="tim-quarters", equal_height=True):
        left, top, right, bottom = borders = [gr.Number(0, label=side, min_width=60) for side in ("Left", "Top", "Right", "Bottom")]
    with gr.Row(elem_classes="tim-pair"):
        strength = gr.Textbox("", label="Strength", info="up to 1; empty: 0.6, with a mask 1", max_lines=1, min_width=80)
        feather = gr.Number(FEATHER, label="Feather", info="soft pixels inside the mask", min_width=80)
    image, mask, key = (gr.Textbox(visible=False) for _ in range(HIDDEN))
    gr.on([each.change for each in borders], None, borders, js="(...pixels) => timEditor.border(pixels)")
    return Editor(image, mask, key, left, top, right, bottom, strength, feather)


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
    """New values of the controls after the hidden ones, which are files of the user's."""
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
