"""The page: its sections side by side."""

from __future__ import annotations

from pathlib import Path

import fastapi
import gradio as gr
from gradio.themes import Default

from launch.serving.page import history, results
from launch.serving.page.compare import build_compare
from launch.serving.page.editor import build_editor
from launch.serving.page.events import Controls, View, connect_drawing, connect_loading, stop_on_close
from launch.serving.page.form import build_form
from launch.serving.page.running import Tabs
from launch.serving.page.texts import status
from launch.serving.studio import Studio

_ACTIONS = "timActions(element, trigger); // 'act'"
_LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
_GIVEN = "timFiles.send(element, trigger, {max_bytes}); // 'give', 'refuse'"
_DROP = """<label class="tim-drop"><span>Drop an image to load its parameters</span>
<input type="file" accept="image/*" aria-label="Image whose parameters are loaded"></label>"""
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # those of the visitor's system
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def mount(app: fastapi.FastAPI, studio: Studio) -> fastapi.FastAPI:
    """Serve the page at `/` of an app. Browsers ask no other server for anything."""
    theme = Default(primary_hue="blue", neutral_hue="gray", spacing_size="sm", radius_size="md", font=_FONTS, font_mono=_MONO)
    return gr.mount_gradio_app(
        app,
        build(studio),
        path="/",
        theme=theme,
        css=_text("page.css"),
        head=f"<style>{_text('frame.css')}</style><script>{_text('page.js')}{_text('editor.js')}</script>",
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        max_file_size=studio.limits.max_upload,
    )


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    tabs = Tabs()
    with gr.Blocks(title="tim", analytics_enabled=False, fill_width=True) as page:
        device = "GPU" if studio.generator.device.type == "cuda" else studio.generator.device.type.upper()
        about = f"sizes up to {studio.limits.max_side} pixels a side, on {device}"
        gr.HTML(f'<header class="tim-header"><h1>tim</h1><span>{about}</span></header>', apply_default_css=False)
        with gr.Row(elem_id="tim-columns"):
            with gr.Column(scale=5, min_width=320, elem_id="tim-controls"):
                controls = _controls(studio)
            with gr.Column(scale=7, min_width=320, elem_id="tim-view"):
                view, drop = _view(studio)
        connect_drawing(studio, tabs, controls, view)
        connect_loading(studio, controls, view, drop)
        page.unload(stop_on_close(tabs))
    page.queue(default_concurrency_limit=None)
    return page


def _text(name: str) -> str:
    """A file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _controls(studio: Studio) -> Controls:
    form, buttons = build_form(studio)
    with gr.Accordion("Change an image", open=False, elem_id="tim-change") as change:
        editor = build_editor(studio.limits)
    with gr.Accordion("Compare", open=False, elem_id="tim-comparing"):
        compare = build_compare(studio.limits)
    return Controls(form, buttons, editor, change, compare)


def _view(studio: Studio) -> tuple[View, gr.HTML]:
    line = gr.HTML(status("Ready."), js_on_load=_LIVE, apply_default_css=False, elem_id="tim-status")
    stage = gr.HTML(results.EMPTY, js_on_load=_ACTIONS, apply_default_css=False, elem_id="tim-stage")
    with gr.Accordion("History", open=True):
        given = _GIVEN.format(max_bytes=studio.limits.max_upload)
        drop = gr.HTML(html_template=_DROP, js_on_load=given, apply_default_css=False, elem_id="tim-drop")
        listing = gr.HTML(history.listing([]), js_on_load=_ACTIONS, apply_default_css=False, elem_id="tim-history")
    return View(line, stage, gr.State(None), gr.State([]), listing), drop
