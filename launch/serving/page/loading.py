"""Parameters from images: of the history, and of files that are dropped on the page. Also the other actions on drawn images."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from typing import Any

import gradio as gr

from launch.sampling.files.a1111 import as_asked
from launch.sampling.files.image_files import Recorded
from launch.sampling.files.settings import Settings
from launch.serving.http.clients import client_of
from launch.serving.page import editor, form, history
from launch.serving.page.controls import FAILED, QUIET, Controls, View
from launch.serving.page.texts import prompt_of, status
from launch.serving.studio import Studio
from pipeline.errors import kind_and_line

log = logging.getLogger(__name__)

_WITHOUT_CONTROL = {"times": "times", "second_prompt": "second prompt", "variation": "variation", "stochasticity": "stochasticity"}
_LONGEST, _MOST = 60, 12  # characters of a parameter that is not taken over, and how many are named


def connect_loading(studio: Studio, controls: Controls, view: View, drop: gr.HTML) -> None:
    """Load the parameters of an image of the history or of a dropped file; use an image as input; delete one from the history."""
    loaded = [view.status, controls.change, *controls.form, *controls.editor[editor.HIDDEN :]]
    nothing = [gr.skip()] * (len(loaded) - 1)
    unchanged = [gr.skip()] * 2  # the history

    def load(settings: Settings, named: str, left_out: list[str]) -> list[Any]:
        line = status(_loaded(settings, named, left_out))
        return [line, gr.skip(), *form.updates_of(controls.form, settings), *editor.updates_of(settings)]

    def act(past: list[history.Entry], event: gr.EventData) -> list[Any]:
        if event.action == "input":
            line = status("The image is the input now: see Change an image.")
            return [line, gr.update(open=True), *nothing[1:-6], 0, 0, 0, 0, *nothing[-2:], *unchanged]
        if event.action == "delete":
            rest = history.without(past, str(event.id))
            return [status("Deleted from the history."), *nothing, rest, history.listing(rest)]
        settings = history.settings_of(past, str(event.id))
        if settings is None or event.action == "gone":
            return [status("The server does not keep that image any more.", is_error=True), *nothing, *unchanged]
        return [*load(settings, "the image", _left_out(settings, studio)), *unchanged]

    async def give(request: gr.Request, event: gr.EventData) -> list[Any]:
        name = str(event.name)[:80]
        try:
            data = base64.b64decode(str(event.content).partition(",")[2], validate=True)
            recorded = await asyncio.to_thread(studio.recorded_in, data, named=name, client=client_of(request))
        except binascii.Error:
            return [status(f"{name}: cannot be read", is_error=True), *nothing]
        except ValueError as error:
            return [status(str(error), is_error=True), *nothing]
        except Exception as error:
            log.warning("an image of the page failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            return [status(FAILED, is_error=True), *nothing]
        return load(*_asked(recorded, name, studio))

    def refuse(event: gr.EventData) -> str:
        reason = f"the limit of a file is {studio.limits.max_upload_mb} MB" if event.reason == "size" else "cannot be read"
        return status(f"{str(event.name)[:80]}: {reason}", is_error=True)

    for place in (view.stage, view.listing):
        place.act(act, view.past, [*loaded, view.past, view.listing], queue=False, **QUIET)
    drop.give(give, None, loaded, **QUIET)
    drop.refuse(refuse, None, view.status, queue=False, **QUIET)


def _asked(recorded: Recorded, name: str, studio: Studio) -> tuple[Settings, str, list[str]]:
    """The settings of a file, its name, and what of them is left out."""
    settings, left_out = as_asked(recorded.settings, recorded.of_a1111)
    return settings, name, [*_left_out(settings, studio), *left_out]


def _left_out(settings: Settings, studio: Studio) -> list[str]:
    """What the page has no control for, or what this server cannot take over."""
    is_class = studio.generator.network.classes is not None
    facts, defaults = studio.facts, studio.generator.spec.sampling
    loras = [(lora.digest, lora.scale) for lora in settings.loras]
    differs = {
        "prompt (this model draws classes)": is_class and isinstance(settings.prompt, str),
        "class (this model draws prompts)": not is_class and not isinstance(settings.prompt, str),
        "interval": settings.interval is not None and list(settings.interval) != list(defaults["interval"]),
        f"model: {settings.model}": settings.model_digest is not None and settings.model_digest != facts.digest,
        "LoRA": loras != [(lora.digest, lora.scale) for lora in facts.loras],
        "image: choose it under Change an image": settings.init_image is not None,
        "mask": settings.mask is not None,
    }
    without = [name for field, name in _WITHOUT_CONTROL.items() if getattr(settings, field)]
    return [*without, *(name for name, is_different in differs.items() if is_different)]


def _loaded(settings: Settings, named: str, left_out: list[str]) -> str:
    """What was loaded, and what was not."""
    shown = [each if len(each) <= _LONGEST else each[: _LONGEST - 1] + "…" for each in left_out[:_MOST]]
    more = f"; and {len(left_out) - _MOST} more" if len(left_out) > _MOST else ""
    rest = f" Not taken over: {'; '.join(shown)}{more}." if left_out else ""
    return f"Loaded the parameters of {named}: {prompt_of(settings) or 'an empty prompt'}.{rest}"
