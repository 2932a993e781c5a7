"""A model of classes, and a password: the page, live previews, downloads and the API behind it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Browser, Error

from launch.sampling.files.image_files import read_settings
from tests.launch.serving.page.conftest import PASSWORD
from tests.launch.serving.page.tab import PROMPT, Tab, pixels
from tests.launch.serving.server import Server


def test_without_the_password_nothing_is_shown(browser: Browser, locked: Server) -> None:
    for credentials in (None, {"username": "any", "password": "wrong"}):
        context = browser.new_context(http_credentials=credentials)  # pyright: ignore[reportArgumentType]
        page = context.new_page()
        with suppress(Error):  # a browser without a window, which would ask for the password, may refuse the answer
            page.goto(locked.url)
        assert not page.locator(PROMPT).count()
        context.close()
    assert locked.get("/").json == {"error": "a password is needed"}
    for path in ("/config", "/api/model", "/docs", "/theme.css", "/gradio_api/info"):
        assert locked.get(path).status == 401


def test_a_class_is_drawn_behind_a_password(open_tab: Callable[..., Tab], locked: Server, tmp_path: Path) -> None:
    tab = open_tab(at=locked, password=PASSWORD)
    page = tab.page
    assert page.get_attribute(PROMPT, "type") == "number"
    assert "a number from 0 to 2" in page.inner_text("#tim-prompt")
    assert not page.get_by_text("Negative prompt").is_visible()
    page.get_by_role("button", name="Compare").click()
    tab.says("with the class and the seed above")

    tab.fill("2", width=120, height=90, Steps=30, Seed=4)
    page.press(PROMPT, "Enter")
    page.wait_for_selector(".tim-previews img")
    page.wait_for_selector(".tim-card")
    (file,) = tab.downloads(tmp_path)
    assert pixels(file).shape == (90, 120, 3)
    assert read_settings(file).prompt == 2
    assert page.inner_text(".tim-card .tim-prompt") == "class 2"

    for number, sentence in (("4", "0 to 2"), ("", "class: give its number"), ("0.5", "not 0.5")):
        page.fill(PROMPT, number)
        assert sentence in tab.error()
    page.fill(PROMPT, "0")
    page.set_input_files("#tim-drop input[type=file]", file)
    page.wait_for_function("where => document.querySelector(where).value == '2'", arg=PROMPT)
    assert tab.status.endswith(": class 2.")

    header = "Basic " + base64.b64encode(f"any:{PASSWORD}".encode()).decode()
    assert locked.get("/api/model", Authorization=header).json["classes"] == 3
    assert locked.get("/docs", Authorization=header).status == 200
