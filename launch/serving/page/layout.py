"""The page: its sections side by side."""

from __future__ import annotations

from html import escape
from pathlib import Path

import fastapi
import gradio as gr
from gradio.themes import Default

from launch.serving.page import history, results
from launch.serving.page.compare import build_compare
from launch.serving.page.controls import Controls, View
from launch.serving.page.editor import HIDDEN, build_editor
from launch.serving.page.events import connect_drawing, stop_on_close
from launch.serving.page.form import build_form
from launch.serving.page.kept import KeptImages
from launch.serving.page.loading import connect_loading
from launch.serving.page.running import Tabs
from launch.serving.page.texts import status
from launch.serving.studio import Studio

_ACTIONS = "timActions(element, trigger); // 'act'"
_ANNOUNCE = "timAnnounce(element)"
_GIVEN = "timFiles.send(element, trigger, {max_bytes}); // 'give', 'refuse'"
_DROP = """<label class="tim-drop"><span>Drop an image to load its parameters</span>
<input type="file" accept="image/*" aria-label="Image whose parameters are loaded"></label>"""
_CONTRAST = {  # at least 4.5 to 1 for every text
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
}
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # those of the visitor's system
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def mount(app: fastapi.FastAPI, studio: Studio) -> fastapi.FastAPI:
    """Serve the page at `/` of an app. Browsers ask no other server for anything."""
    theme = Default(primary_hue="blue", neutral_hue="gray", spacing_size="sm", radius_size="md", font=_FONTS, font_mono=_MONO)
    theme.set(**_CONTRAST)
    scripts = "".join(_text(name) for name in ("files.js", "mask.js", "editor.js", "page.js"))
    return gr.mount_gradio_app(
        app,
        build(studio),
        path="/",
        theme=theme,
        css=_text("page.css"),
        head=f"<style>{_text('frame.css')}</style><script>{scripts}</script>",
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        max_file_size=studio.limits.max_upload,
    )


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    tabs, images = Tabs(), KeptImages()
    name = studio.facts.name
    with gr.Blocks(title=f"{name} · tim", analytics_enabled=False, fill_width=True) as page:
        device = "GPU" if studio.generator.device.type == "cuda" else studio.generator.device.type.upper()
        about = f"{escape(name)} · sizes up to {studio.limits.max_side} pixels a side, on {device}"
        header = (
            f'<header class="tim-header"><h1>tim</h1><span>{about}</span><a href="docs" target="_blank" rel="noopener">API</a></header>'
        )
        gr.HTML(header, apply_default_css=False, elem_classes="tim-plain")
        with gr.Row(elem_id="tim-columns"):
            with gr.Column(scale=5, min_width=320, elem_id="tim-controls"):
                controls = _controls(studio)
            with gr.Column(scale=7, min_width=320, elem_id="tim-view"):
                view, drop = _view(studio)
        connect_drawing(studio, tabs, images, controls, view)
        connect_loading(studio, controls, view, drop)
        _connect_keeping(page, controls, name=studio.facts.digest[:16])
        page.unload(stop_on_close(tabs, images))
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


def _connect_keeping(page: gr.Blocks, controls: Controls, *, name: str) -> None:
    """Let the browser keep what was typed, until the tab is closed. name: of the model."""
    kept = controls.inputs()[HIDDEN:]
    changes = [each.change for each in kept]  # pyright: ignore[reportAttributeAccessIssue]
    gr.on(changes, None, kept, js=f"(...values) => timKept.keep('{name}', values)")
    page.load(None, kept, kept, js=f"(...values) => timKept.values('{name}', values)")


def _text(name: str) -> str:
    """A file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _controls(studio: Studio) -> Controls:
    form, buttons = build_form(studio)
    with gr.Accordion("Change an image", open=False, elem_id="tim-change") as change:
        editor = build_editor(studio.limits)
    with gr.Accordion("Compare", open=False, elem_id="tim-comparing"):
        compare = build_compare(studio.limits, prompt="prompt" if studio.generator.network.classes is None else "class")
    return Controls(form, buttons, editor, change, compare)


def _view(studio: Studio) -> tuple[View, gr.HTML]:
    line = gr.HTML(status("Ready."), js_on_load=_ANNOUNCE, apply_default_css=False, elem_id="tim-status")
    stage = gr.HTML(results.EMPTY, js_on_load=_ACTIONS, apply_default_css=False, elem_id="tim-stage")
    with gr.Accordion("History", open=True):
        given = _GIVEN.format(max_bytes=studio.limits.max_upload)
        drop = gr.HTML(html_template=_DROP, js_on_load=given, apply_default_css=False, elem_id="tim-drop")
        listing = gr.HTML(history.listing([]), js_on_load=_ACTIONS, apply_default_css=False, elem_id="tim-history")
    return View(line, stage, gr.State(None), gr.State([]), gr.State([]), listing), drop
