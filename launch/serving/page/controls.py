"""The parts of the page that its listeners read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from gradio.components import Component

from launch.serving.page.compare import Compare
from launch.serving.page.editor import Editor
from launch.serving.page.form import Buttons, Form

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of every listener
FAILED = "the server failed; its log has the reason"


class View(NamedTuple):
    """The part of the page that shows results. seed: of the last request, as text; new: images that are not in the history yet.

    past: the history of the tab.
    """

    status: gr.HTML
    stage: gr.HTML
    seed: gr.State
    new: gr.State
    past: gr.State
    listing: gr.HTML


class Controls(NamedTuple):
    """The part of the page that says what is drawn."""

    form: Form
    buttons: Buttons
    editor: Editor
    change: gr.Accordion
    compare: Compare

    def inputs(self) -> list[Component]:
        """Those that a request is made of; the image, its mask and its key come first."""
        return [*self.editor, *self.form, *self.compare.lists()]

    def split(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The values of the inputs by name: of the editor, the form and the comparison."""
        rest = iter(values)
        in_editor = {name: next(rest) for name in self.editor._fields}
        in_form = {name: next(rest) for name in self.form._fields}
        return in_editor, in_form, dict(zip(("steps", "guidance", "sizes"), rest, strict=True))
