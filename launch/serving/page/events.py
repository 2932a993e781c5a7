"""What happens on the page: drawing, stopping, and loading parameters."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr
from gradio.components import Component
from pydantic import ValidationError

from launch.sampling.files.settings import Settings
from launch.serving.drawing import DrawRequest, sentence_of
from launch.serving.jobs import Event, Finished, Job, Progress
from launch.serving.page import compare, editor, form, history, results
from launch.serving.page.running import Tabs
from launch.serving.page.texts import prompt_of, status
from launch.serving.studio import Studio
from pipeline.errors import kind_and_line

log = logging.getLogger(__name__)

_FAILED = "the server failed; its log has the reason"
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_SEND = "(...values) => timRequest(values)"
_WITHOUT_CONTROL = ("times", "second_prompt", "variation", "stochasticity", "loras", "init_image", "mask")


@dataclass(frozen=True, slots=True)
class View:
    """The part of the page that shows results. seed: of the last request, as text; past: the history of the tab."""

    status: gr.HTML
    stage: gr.HTML
    seed: gr.State
    past: gr.State
    listing: gr.HTML

    def outputs(self) -> list[Component]:
        """All of them, in order."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, slots=True)
class Controls:
    """The part of the page that says what is drawn."""

    form: form.Form
    buttons: form.Buttons
    editor: editor.Editor
    change: gr.Accordion
    compare: compare.Compare

    def inputs(self) -> list[Component]:
        """Those that a request is made of; the image and its mask come first."""
        return [*self.editor.controls(), *self.form.controls(), *self.compare.lists()]

    def split(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The values of the inputs by name: of the editor, the form and the comparison."""
        rest = iter(values)
        in_editor = {field.name: next(rest) for field in fields(self.editor)}
        in_form = {field.name: next(rest) for field in fields(self.form)}
        return in_editor, in_form, dict(zip(("steps", "guidance", "sizes"), rest, strict=True))


def connect_drawing(studio: Studio, tabs: Tabs, controls: Controls, view: View) -> None:
    """Draw, draw a grid, Stop, and the seed of the last image."""
    inputs = [*controls.inputs(), view.past]
    buttons = controls.buttons
    draw = _drawing(studio, tabs, controls, is_grid=False)
    gr.on([buttons.draw.click, controls.form.prompt.submit], draw, inputs, view.outputs(), js=_SEND, **_QUIET)  # pyright: ignore
    draw_grid = _drawing(studio, tabs, controls, is_grid=True)
    controls.compare.draw.click(draw_grid, inputs, view.outputs(), js=_SEND, **_QUIET)

    def stop(request: gr.Request) -> None:
        tabs.stop(_session(request))

    buttons.stop.click(stop, None, None, queue=False, **_QUIET)
    buttons.reuse.click(lambda seed: seed or "", view.seed, controls.form.seed, queue=False, **_QUIET)


def connect_loading(studio: Studio, controls: Controls, view: View, drop: gr.HTML) -> None:
    """Load the parameters of an image of the history or of a dropped file, and open the editor for one that becomes its input."""
    loaded = [view.status, controls.change, *controls.form.controls(), *controls.editor.controls()[2:]]
    nothing = [gr.skip()] * (len(loaded) - 1)

    def load(settings: Settings, named: str) -> list[Any]:
        line = status(_loaded(settings, named))
        return [line, gr.skip(), *form.updates_of(controls.form, settings), *editor.updates_of(settings)]

    def act(past: list[history.Entry], event: gr.EventData) -> list[Any]:
        if event.action == "input":
            return [status("The image is the input now: see Change an image."), gr.update(open=True), *nothing[1:]]
        settings = history.settings_of(past, str(event.id))
        if settings is None:
            return [status("That image is not in the history of this tab any more.", is_error=True), *nothing]
        return load(settings, "the image")

    async def give(event: gr.EventData) -> list[Any]:
        name = str(event.name)[:80]
        try:
            data = base64.b64decode(str(event.content).partition(",")[2], validate=True)
            settings = await asyncio.to_thread(studio.uploads.settings, data, named=name)
        except binascii.Error:
            return [status(f"{name}: cannot be read", is_error=True), *nothing]
        except ValueError as error:
            return [status(str(error), is_error=True), *nothing]
        except Exception as error:
            log.warning("an image of the page failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            return [status(_FAILED, is_error=True), *nothing]
        return load(settings, name)

    def refuse(event: gr.EventData) -> str:
        return status(f"{str(event.name)[:80]}: the limit of a file is {studio.limits.max_upload_mb} MB", is_error=True)

    for place in (view.stage, view.listing):
        place.act(act, view.past, loaded, queue=False, **_QUIET)
    drop.give(give, None, loaded, **_QUIET)
    drop.refuse(refuse, None, view.status, queue=False, **_QUIET)


def stop_on_close(tabs: Tabs) -> Callable[..., None]:
    """A listener of `Blocks.unload`: it cancels the request of the tab that is closed."""

    def unload(request: gr.Request) -> None:
        tabs.stop(_session(request))

    return unload


def _drawing(studio: Studio, tabs: Tabs, controls: Controls, *, is_grid: bool) -> Callable[..., AsyncIterator[list[Any]]]:
    """A listener that draws what the controls ask for and yields the view's new values."""

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        *given, past = values
        try:
            asked = _asked(*controls.split(given), is_grid=is_grid)
            client = request.client.host if request.client else ""
            async for job, event, seconds in tabs.follow(studio, asked, session=_session(request), client=client):
                yield await asyncio.to_thread(_shown, job, event, seconds, past, is_grid=is_grid)
        except ValueError as error:
            yield [status(_sentence(error), is_error=True), *[gr.skip()] * 4]
        except Exception as error:  # its message may name files of the server
            log.warning("a request of the page failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            yield [status(_FAILED, is_error=True), *[gr.skip()] * 4]

    return draw


def _asked(in_editor: dict[str, Any], in_form: dict[str, Any], in_compare: dict[str, Any], *, is_grid: bool) -> DrawRequest:
    """The request of the controls' values. Raises ValueError."""
    edit = editor.request_fields(in_editor)
    asked = form.request_fields(in_form, is_edit=bool(edit)) | edit
    if is_grid:
        asked |= compare.request_fields(in_compare, is_edit=bool(edit))
    return DrawRequest.model_validate(asked)


def _shown(job: Job, event: Event, seconds: float, past: list[history.Entry], *, is_grid: bool) -> list[Any]:
    """The view's values after an event."""
    line = results.status_of(event, seconds=seconds, remarks=job.remarks)
    if isinstance(event, Finished):
        shown = compare.grid_of(event.results) if is_grid else results.cards(event.results)
        past = history.added(past, event.results)
        return [line, shown, str(event.results[0].settings.seed), past, history.listing(past)]
    shown = results.previews(event) if isinstance(event, Progress) and (event.previews or event.results) else gr.skip()
    return [line, shown, *[gr.skip()] * 3]


def _sentence(error: ValueError) -> str:
    """What is wrong with a request; of several mistakes the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    mistake = error.errors(include_url=False, include_context=False)[0]
    return sentence_of({**mistake, "loc": ("body", *mistake["loc"])})


def _loaded(settings: Settings, named: str) -> str:
    """What was loaded, and what of it the page has no control for."""
    left_out = [name.replace("_", " ") for name in _WITHOUT_CONTROL if getattr(settings, name)]
    rest = f" Not taken over: {', '.join(left_out)}." if left_out else ""
    return f"Loaded the parameters of {named}: {prompt_of(settings) or 'an empty prompt'}.{rest}"


def _session(request: gr.Request) -> str:
    return request.session_hash or ""
