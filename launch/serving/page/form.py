"""The form: prompt, size, steps, guidance, count and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

from launch.sampling.files.settings import Settings
from launch.sampling.prompts.aspect import MEGAPIXEL, checked_size
from launch.serving.drawing import check_size
from launch.serving.limits import Limits
from launch.serving.page.texts import hint
from launch.serving.studio import Studio

BY_PIXELS, BY_ASPECT = "Width × height", "Aspect ratio"
ASPECTS = ["1:1", "4:3", "3:2", "16:9", "21:9", "3:4", "2:3", "9:16"]
_OF_IMAGE = "There is an image to change: it gives the size. Remove it to draw from the prompt alone."
_LIVE = "element.setAttribute('aria-live', 'polite')"
_SIDE = 512  # pixels at the start, if the server allows as many


class Form(NamedTuple):
    """The controls that say what is drawn. `values` of the callbacks are in the order of the fields."""

    prompt: Component
    negative: Component
    size_by: Component
    width: Component
    height: Component
    aspect: Component
    megapixels: Component
    steps: Component
    guidance: Component
    images: Component
    seed: Component


class Buttons(NamedTuple):
    """The form's buttons that need more than the form."""

    draw: gr.Button
    stop: gr.Button
    reuse: gr.Button


def build_form(studio: Studio) -> tuple[Form, Buttons]:
    """The controls, within the column in hand."""
    defaults = studio.generator.spec.sampling
    prompt, negative = _prompts(studio)
    size_by, width, height, aspect, megapixels = _size(studio.limits)
    with gr.Row(elem_classes="tim-pair"):
        steps = gr.Number(int(defaults["steps"]), label="Steps", info=f"1 to {studio.limits.max_steps}", min_width=80)
        guidance = gr.Number(float(defaults["guidance"]), label="Guidance", info="1: none", min_width=80, step=0.5)
    with gr.Row(elem_classes="tim-pair"):
        count = gr.Number(1, label="Count", info=f"images, up to {studio.limits.max_count}", min_width=80)
        seed = gr.Textbox("", label="Seed", info="empty or -1: a new one", max_lines=1, min_width=120)
    with gr.Row(elem_classes="tim-pair"):
        random = gr.Button("Random seed", size="sm", min_width=80)
        reuse = gr.Button("Reuse last seed", size="sm", min_width=80)
    with gr.Row(elem_classes="tim-pair"):
        draw = gr.Button("Draw", variant="primary", elem_id="tim-draw", min_width=80)
        stop = gr.Button("Stop", variant="secondary", elem_id="tim-stop", min_width=80)
    random.click(lambda: "", None, seed, queue=False, show_progress="hidden", api_visibility="private")
    form = Form(prompt, negative, size_by, width, height, aspect, megapixels, steps, guidance, count, seed)
    return form, Buttons(draw, stop, reuse)


def request_fields(values: Mapping[str, Any], *, is_edit: bool) -> dict[str, Any]:
    """The form's part of a `DrawRequest`. is_edit: the image to change gives the size. Raises ValueError for a seed that is no number."""
    size: dict[str, Any] = {}
    if not is_edit and values["size_by"] == BY_ASPECT:
        size = {"aspect": str(values["aspect"] or ""), "megapixels": values["megapixels"]}
    elif not is_edit:
        size = {"width": whole(values["width"]), "height": whole(values["height"])}
    return {
        "prompt": _prompt(values["prompt"]),
        "negative": values["negative"] or None,
        **size,
        "steps": whole(values["steps"]),
        "guidance": values["guidance"],
        "count": 1 if values["images"] is None else whole(values["images"]),
        "seed": _seed(values["seed"]),
    }


def updates_of(form: Form, settings: Settings) -> list[Any]:
    """New values of the controls, in order, that draw with the settings of an image. None: not recorded, so the control stays."""
    steps = settings.steps if settings.times is None else len(settings.times) - 1
    is_class = isinstance(form.prompt, gr.Number)
    fits = isinstance(settings.prompt, int) == is_class
    values = {
        "prompt": settings.prompt if fits else None,
        "negative": None if is_class else str(settings.negative or ""),
        "size_by": BY_PIXELS,
        "width": settings.width,
        "height": settings.height,
        "steps": steps,
        "guidance": settings.guidance,
        "images": 1,
        "seed": None if settings.seed is None else str(settings.seed),
    }
    return [gr.skip() if values.get(name) is None else values[name] for name in form._fields]


def whole(value: float | None) -> float | int | None:
    """3.0 → 3, as browsers send it; other numbers stay, so that the check names them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _prompts(studio: Studio) -> tuple[Component, Component]:
    classes = studio.generator.network.classes
    if classes is None:
        prompt = gr.Textbox(
            label="Prompt",
            placeholder="What to draw",
            lines=1,
            max_lines=8,
            autofocus=True,
            elem_id="tim-prompt",
            info="Enter draws, Shift+Enter starts a new line",
        )
    else:
        null = studio.generator.network.null_class
        info = f"a number from 0 to {classes - 1}{'' if null is None else f', {null} for none'}; Enter draws"
        prompt = gr.Number(0, label="Class", info=info, elem_id="tim-prompt")
    with gr.Accordion("Negative prompt", open=False, visible=classes is None):
        negative = gr.Textbox(label="Negative prompt", show_label=False, lines=1, max_lines=4, placeholder="What guidance leads away from")
    return prompt, negative


def _size(limits: Limits) -> tuple[Component, Component, Component, Component, Component]:
    """The controls of the size, with a line that says at once what exceeds the limits."""
    side = min(_SIDE, limits.max_side, math.isqrt(limits.max_pixels))
    with gr.Group():
        gr.HTML(hint(_OF_IMAGE), apply_default_css=False, elem_classes="tim-if-image")
        size_by = gr.Radio([BY_PIXELS, BY_ASPECT], value=BY_PIXELS, label="Size", elem_classes="tim-size-by")
        with gr.Row(elem_classes="tim-pair") as by_pixels:
            width = gr.Number(side, label="Width", info="pixels", min_width=80, elem_id="tim-width")
            height = gr.Number(side, label="Height", info="pixels", min_width=80, elem_id="tim-height")
        with gr.Row(visible=False, elem_classes="tim-pair") as by_aspect:
            aspect = gr.Dropdown(ASPECTS, value="3:2", allow_custom_value=True, label="Aspect ratio", info="or your own W:H", min_width=80)
            area = side * side / MEGAPIXEL
            megapixels = gr.Number(area, label="Megapixels", info="1 is 1024 × 1024", min_width=80, step=0.25)
        with gr.Row(elem_classes="tim-pair tim-size-note"):
            note = gr.HTML(_size_note(side, side, limits), min_width=120, apply_default_css=False, js_on_load=_LIVE)
            swap = gr.Button("⇄ Swap sides", size="sm", min_width=80)
    sized = [size_by, width, height, aspect, megapixels]
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    size_by.change(
        lambda by: (gr.update(visible=by == BY_PIXELS), gr.update(visible=by == BY_ASPECT)), size_by, [by_pixels, by_aspect], **quiet
    )
    swap.click(lambda width, height, aspect: (height, width, ":".join(reversed(str(aspect).split(":")))), sized[1:4], sized[1:4], **quiet)

    def say(size_by: str, width: float | None, height: float | None, aspect: str | None, megapixels: float | None) -> str:
        return _size_note(whole(width), whole(height), limits) if size_by == BY_PIXELS else _aspect_note(aspect, megapixels, limits)

    gr.on([control.change for control in sized], say, sized, note, **quiet)
    return size_by, width, height, aspect, megapixels


def _aspect_note(aspect: str | None, megapixels: float | None, limits: Limits) -> str:
    """The size in pixels, or what is wrong with it."""
    try:
        height, width = checked_size(str(aspect or ""), megapixels=megapixels or 0.0, names=("Aspect ratio", "Megapixels"))
    except ValueError as error:
        return hint(str(error), is_error=True)
    return _size_note(width, height, limits)


def _size_note(width: float | None, height: float | None, limits: Limits) -> str:
    if not width or not height:
        return hint("Give width and height")
    if not isinstance(width, int) or not isinstance(height, int) or min(width, height) < 1:
        return hint("Width and height are whole numbers of pixels, 1 or more", is_error=True)
    try:
        check_size(width, height, named="Size", limits=limits)
    except ValueError as error:
        return hint(str(error), is_error=True)
    return hint(f"{width} × {height} pixels, exactly")


def _prompt(value: str | float | None) -> str | float | None:
    """A text, or the number of a class."""
    if value is None:
        raise ValueError("class: give its number")
    return value if isinstance(value, str) else whole(value)


def _seed(text: str | None) -> int | None:
    if (text or "").strip() in ("", "-1"):
        return None
    try:
        return int(str(text))
    except ValueError:
        raise ValueError(f"seed {text!r:.40}: give a whole number, or leave it empty for a new one") from None
