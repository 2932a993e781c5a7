"""What stays: what was typed, over a reload; an image, which is sent once; and the page, when its server ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from launch.serving.page.kept import Forgotten, KeptImages
from tests.launch.serving.page.tab import CLOSED, PROMPT, Tab
from tests.launch.serving.server import started

REQUESTS = "/gradio_api/queue/join"


def test_what_was_typed_outlives_a_reload_in_the_middle_of_drawing(open_tab: Callable[..., Tab]) -> None:
    tab, other = open_tab(expected=CLOSED), open_tab()
    tab.fill("a fox", width=256, height=250, Steps=128, Seed=9)
    tab.page.click("#tim-draw")
    tab.page.wait_for_selector(".tim-previews img")
    tab.page.reload()
    tab.page.wait_for_function("([where, text]) => document.querySelector(where)?.value == text", arg=[PROMPT, "a fox"])
    tab.page.wait_for_function("document.querySelector('#tim-height input').value == '250'")
    tab.says("Ready.")
    assert tab.seed == "9"
    assert other.page.input_value(PROMPT) == ""
    tab.fill("a fox", width=8, height=8, Steps=1)
    tab.draw()  # the request before the reload is cancelled: its 128 steps would take longer than the wait


def test_an_image_is_sent_once(tab: Tab, tmp_path: Path) -> None:
    sent: list[int] = []
    tab.page.on("request", lambda request: sent.append(len(request.post_data or "")) if REQUESTS in request.url else None)
    levels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(levels).save(tmp_path / "in.png")
    size = (tmp_path / "in.png").stat().st_size
    tab.fill("a", width=8, height=8, Steps=1)
    tab.page.get_by_role("button", name="Change an image").click()
    tab.page.set_input_files("#tim-editor input[type=file]", tmp_path / "in.png")
    tab.says("300 × 200 pixels, and so is the result.")
    largest = []
    for _ in range(2):
        sent.clear()
        tab.draw()
        largest.append(max(sent))
    assert largest[0] > size
    assert largest[1] < 5000


def test_images_of_tabs_are_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.serving.page.kept._KEPT", 10)
    images = KeptImages()
    assert images.image("a", key="1", sent="x" * 8) == "x" * 8
    assert images.image("a", key="1", sent=None) == "x" * 8
    assert images.image("b", key="1", sent="y" * 8) == "y" * 8  # drops that of a
    for session, key in (("a", "1"), ("b", "2"), ("c", "1")):
        with pytest.raises(Forgotten, match="press Draw again"):
            images.image(session, key=key, sent=None)
    assert images.image("b", key="1", sent="z") == "z"
    images.drop("b")
    with pytest.raises(Forgotten):
        images.image("b", key="1", sent=None)
    assert images.image("b", key=None, sent=None) is None


def test_a_server_that_ends_and_starts_again(open_tab: Callable[..., Tab], model: Path) -> None:
    with started(model) as first:
        tab = open_tab(at=first, expected="Failed to load resource|Unexpected error|Method not implemented|fetch|network|heartbeat")
        tab.fill("a fox", width=256, height=256, Steps=120)
        tab.page.click("#tim-draw")
        tab.page.wait_for_selector(".tim-previews img")
    tab.says("The server does not answer.")
    assert tab.page.locator("#tim-status .tim-error").count() == 1
    with started(model, "--port", str(urlsplit(first.url).port)):
        tab.says("Ready.")
        tab.page.wait_for_function("([where, text]) => document.querySelector(where)?.value == text", arg=[PROMPT, "a fox"])
        tab.fill("a fox", width=8, height=8, Steps=1)
        tab.draw()
