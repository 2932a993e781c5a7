"""Drawing on the page: Draw, Draw the grid, Stop, and the seed of the last image."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from pydantic import ValidationError

from launch.serving.http.clients import client_of
from launch.serving.jobs import Event, Finished, Job, Progress
from launch.serving.page import compare, editor, form, history, results
from launch.serving.page.controls import FAILED, QUIET, Controls, View
from launch.serving.page.kept import Forgotten, KeptImages
from launch.serving.page.running import Tabs
from launch.serving.page.texts import status
from launch.serving.requests import DrawRequest, sentence_of
from launch.serving.studio import Studio
from pipeline.errors import kind_and_line

log = logging.getLogger(__name__)

_SEND = "(...values) => timRequest(values)"


def connect_drawing(studio: Studio, tabs: Tabs, images: KeptImages, controls: Controls, view: View) -> None:
    """Draw, draw a grid, Stop, and the seed of the last image."""
    inputs, outputs = controls.inputs(), [view.status, view.stage, view.seed, view.new, controls.editor.key]
    buttons = controls.buttons
    draw = _drawing(studio, tabs, images, controls, is_grid=False)
    draw_grid = _drawing(studio, tabs, images, controls, is_grid=True)
    drawn = [
        gr.on([buttons.draw.click, controls.form.prompt.submit], draw, inputs, outputs, js=_SEND, **QUIET),  # pyright: ignore
        controls.compare.draw.click(draw_grid, inputs, outputs, js=_SEND, **QUIET),
    ]

    def add(new: list[history.Entry], past: list[history.Entry]) -> list[Any]:
        entries = history.added(past, new)
        return [[], entries, history.listing(entries)] if new else [gr.skip()] * 3

    for event in drawn:  # the history as it is then: images may be deleted meanwhile
        event.then(add, [view.new, view.past], [view.new, view.past, view.listing], queue=False, **QUIET)

    def stop(request: gr.Request) -> None:
        tabs.stop(_session(request))

    buttons.stop.click(stop, None, None, queue=False, **QUIET)
    buttons.reuse.click(lambda seed: seed or "", view.seed, controls.form.seed, queue=False, **QUIET)


def stop_on_close(tabs: Tabs, images: KeptImages) -> Callable[..., None]:
    """A listener of `Blocks.unload`: it cancels the request of the tab that is closed, and forgets its image."""

    def unload(request: gr.Request) -> None:
        tabs.stop(_session(request))
        images.drop(_session(request))

    return unload


def _drawing(
    studio: Studio, tabs: Tabs, images: KeptImages, controls: Controls, *, is_grid: bool
) -> Callable[..., AsyncIterator[list[Any]]]:
    """A listener that draws what the controls ask for and yields the view's new values, and the key of the image that is kept."""

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        in_editor, in_form, in_compare = controls.split(values)
        session, key = _session(request), in_editor["key"] or ""
        try:
            in_editor["image"] = images.image(session, key=key, sent=in_editor["image"])
            asked = _asked(in_editor, in_form, in_compare, is_grid=is_grid)
            async for job, event, seconds in tabs.follow(studio, asked, session=session, client=client_of(request)):
                yield [*await asyncio.to_thread(_shown, job, event, seconds, is_grid=is_grid), key]
        except Forgotten as error:
            yield [status(str(error), is_error=True), *[gr.skip()] * 3, ""]
        except ValueError as error:
            yield [status(_sentence(error), is_error=True), *[gr.skip()] * 3, key]
        except Exception as error:  # its message may name files of the server
            log.warning("a request of the page failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            yield [status(FAILED, is_error=True), *[gr.skip()] * 3, key]

    return draw


def _asked(in_editor: dict[str, Any], in_form: dict[str, Any], in_compare: dict[str, Any], *, is_grid: bool) -> DrawRequest:
    """The request of the controls' values. Raises ValueError."""
    edit = editor.request_fields(in_editor)
    asked = form.request_fields(in_form, is_edit=bool(edit)) | edit
    if is_grid:
        asked |= compare.request_fields(in_compare, is_edit=bool(edit))
    return DrawRequest.model_validate(asked)


def _shown(job: Job, event: Event, seconds: float, *, is_grid: bool) -> list[Any]:
    """Status line, images, seed and entries of the history after an event."""
    line = results.status_of(event, seconds=seconds, remarks=job.remarks)
    if isinstance(event, Finished):
        shown = compare.grid_of(event.results) if is_grid else results.cards(event.results)
        entries = [history.Entry(result.image_id, result.settings) for result in event.results]
        return [line, shown, str(event.results[0].settings.seed), entries]
    if not isinstance(event, Progress) or not (event.previews or event.results):
        return [line, *[gr.skip()] * 3]
    wanted = [] if is_grid else job.wanted
    return [line, results.previews(event, size=wanted[0].image.size if wanted else None), *[gr.skip()] * 2]


def _sentence(error: ValueError) -> str:
    """What is wrong with a request."""
    return sentence_of(error.errors(include_url=False, include_context=False)) if isinstance(error, ValidationError) else str(error)


def _session(request: gr.Request) -> str:
    return request.session_hash or ""
