"""A tab with the page, and what a visitor does in it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page

ERROR = "#tim-status .tim-error"
CLOSED = "BodyStreamBuffer was aborted|Connection errored out"  # in the console of a page that is left while it draws
PROMPT = "#tim-prompt :is(textarea, input)"


class Tab:
    """The page in a browser."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def fill(self, prompt: str, *, width: int, height: int, **controls: object) -> None:
        """Type a prompt, a size, and values of controls by their label."""
        self.page.fill(PROMPT, prompt)
        self.page.fill("#tim-width input", str(width))
        self.page.fill("#tim-height input", str(height))
        for label, value in controls.items():
            self.page.locator("#tim-controls").get_by_label(label, exact=False).first.fill(str(value))

    def draw(self, press: str = "#tim-draw") -> None:
        """Press a button, and wait for the images."""
        before = self.first_image()
        self.page.click(press)
        self.wait_for_images(before)

    def wait_for_images(self, before: str) -> None:
        """Wait until the first finished image is another than `before`."""
        self.page.wait_for_function("before => document.querySelector('.tim-card') && " + _FIRST + " != before", arg=before)

    def first_image(self) -> str:
        """The id of the first finished image, empty without one."""
        return self.page.evaluate(_FIRST)

    @property
    def status(self) -> str:
        return self.page.inner_text(".tim-status")

    @property
    def seed(self) -> str:
        return self.page.get_by_label("Seed", exact=False).first.input_value()

    def error(self, press: str = "#tim-draw") -> str:
        """Press a button, and wait for a sentence that says what is wrong: another than before."""
        before = self.status
        self.page.click(press)
        script = "([where, before]) => ![before, undefined].includes(document.querySelector(where)?.innerText)"
        self.page.wait_for_function(script, arg=[ERROR, before])
        return self.status

    def says(self, text: str) -> None:
        """Wait until the page shows a text."""
        self.page.get_by_text(text, exact=False).first.wait_for()

    def downloads(self, folder: Path) -> list[Path]:
        """The files of all finished images, as the browser saves them."""
        paths = []
        for number, link in enumerate(self.page.locator(".tim-card a[download]").all()):
            with self.page.expect_download() as download:
                link.click()
            paths.append(folder / f"{number}-{download.value.suggested_filename}")
            download.value.save_as(paths[-1])
        return paths

    def mask(self) -> np.ndarray:
        """The mask as it is sent, uint8 (height, width)."""
        url = self.page.evaluate("async () => (await timEditor.content())[1]")
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            return np.asarray(image.convert("L"))


def put(control: Locator, text: str) -> None:
    """Type into a control that has just been shown: gradio may set its first value after that, over what was typed."""
    for _ in range(50):
        control.fill(text)
        control.page.wait_for_timeout(500)
        if control.input_value() == text:
            return
    raise AssertionError(f"the control does not keep {text!r}")


_FIRST = "(document.querySelector('.tim-card')?.dataset.image ?? '')"


def pixels(path: Path) -> np.ndarray:
    """uint8 (height, width, 3) of an image file."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
