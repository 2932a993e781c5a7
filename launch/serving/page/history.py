"""The history of a tab: the images drawn since it was opened. A click loads the parameters of one."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from launch.sampling.files.settings import Settings
from launch.serving.jobs import Result
from launch.serving.page.texts import image_url, prompt_of, summary

KEPT = 60  # images


class Entry(NamedTuple):
    """A drawn image."""

    image_id: str
    settings: Settings


def added(history: Sequence[Entry], results: Sequence[Result]) -> list[Entry]:
    """The history, newest first, with the images of a finished request."""
    return [*(Entry(result.image_id, result.settings) for result in results), *history][:KEPT]


def settings_of(history: Sequence[Entry], image_id: str) -> Settings | None:
    """The settings of an image of this tab, None if it is not in its history."""
    return next((entry.settings for entry in history if entry.image_id == image_id), None)


def listing(history: Sequence[Entry]) -> str:
    """The history as a list of buttons."""
    if not history:
        return '<p class="tim-hint">Images of this tab are listed here. Closing it forgets them.</p>'
    return f'<ol class="tim-history" aria-label="History, newest first">{"".join(map(_item, history))}</ol>'


def _item(entry: Entry) -> str:
    label = escape(entry.image_id, quote=True)
    return f"""<li><button data-action="load" data-id="{label}" title="Load its parameters">
<img src="{image_url(entry.image_id)}" alt="" loading="lazy">
<span><b>{escape(prompt_of(entry.settings)) or "(empty prompt)"}</b><br>{summary(entry.settings)}</span></button></li>"""
