"""The history of a tab: the images drawn since it was opened, with what can be done with each."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from launch.sampling.files.settings import Settings
from launch.serving.page.texts import image_url, prompt_of, summary

KEPT = 60  # images


class Entry(NamedTuple):
    """A drawn image."""

    image_id: str
    settings: Settings


def added(history: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """The history, newest first, with the images of a finished request."""
    return [*new, *history][:KEPT]


def without(history: Sequence[Entry], image_id: str) -> list[Entry]:
    """The history without an image."""
    return [entry for entry in history if entry.image_id != image_id]


def settings_of(history: Sequence[Entry], image_id: str) -> Settings | None:
    """The settings of an image of this tab, None if it is not in its history."""
    return next((entry.settings for entry in history if entry.image_id == image_id), None)


def listing(history: Sequence[Entry]) -> str:
    """The history as a list of images with their buttons."""
    if not history:
        return '<p class="tim-hint">Images of this tab are listed here. Closing it forgets them.</p>'
    return f'<ol class="tim-history" aria-label="History, newest first">{"".join(map(_item, history))}</ol>'


def _item(entry: Entry) -> str:
    settings, url = entry.settings, image_url(entry.image_id)
    label = escape(entry.image_id, quote=True)
    prompt, facts = escape(prompt_of(settings), quote=True) or "(empty prompt)", summary(settings)
    named = f"{prompt}, {facts}"
    return f"""<li><button class="tim-load" data-action="load" data-id="{label}" title="Load its parameters">
<img src="{url}" alt="" loading="lazy"><span><b>{prompt}</b><br>{facts}</span></button>
<div class="tim-actions"><a class="tim-button" href="{url}" download aria-label="Download: {named}">Download</a>
<button class="tim-button" data-action="input" data-id="{label}" data-url="{url}" aria-label="Use as input: {named}">Use as input</button>
<button class="tim-button" data-action="delete" data-id="{label}" aria-label="Delete: {named}">Delete</button></div></li>"""
