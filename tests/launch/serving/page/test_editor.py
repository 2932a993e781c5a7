"""The editor: masks at the image's own size, unmasked pixels bit by bit, outpainting, and results as inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.launch.serving.page.conftest import PASSWORD
from tests.launch.serving.page.tab import Tab, pixels, put
from tests.launch.serving.server import Server

CANVAS = "#tim-editor canvas"


def opened(tab: Tab, path: Path) -> None:
    """Open the section with an image in it."""
    tab.page.get_by_role("button", name="Change an image").click()
    tab.page.set_input_files("#tim-editor input[type=file]", path)
    tab.page.wait_for_selector(CANVAS, state="visible")


def noise(path: Path, *, width: int, height: int) -> np.ndarray:
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(array).save(path)
    return array


def test_what_is_not_painted_comes_back_bit_by_bit(tab: Tab, tmp_path: Path) -> None:
    original = noise(tmp_path / "in.png", width=97, height=61)
    tab.fill("a", width=8, height=8, Steps=1)
    opened(tab, tmp_path / "in.png")
    box = tab.page.locator(CANVAS).bounding_box()
    assert box is not None
    assert box["width"] > 97  # the browser shows it larger than it is
    tab.page.locator(CANVAS).click(position={"x": box["width"] / 4, "y": box["height"] / 2})
    mask = tab.mask()
    assert mask.shape == (61, 97)
    rows, columns = np.nonzero(mask)
    assert abs(float(columns.mean()) - 97 / 4) < 1
    assert abs(float(rows.mean()) - 61 / 2) < 1
    assert columns.max() - columns.min() + 1 == 32  # the brush, in pixels of the image
    tab.draw()
    drawn = pixels(tab.downloads(tmp_path)[0])
    assert np.array_equal(drawn[mask == 0], original[mask == 0])
    assert (drawn != original).any(axis=2).sum() > 100


def test_a_large_mask_is_not_resampled(open_tab: Callable[..., Tab], locked: Server, tmp_path: Path) -> None:
    tab = open_tab(at=locked, password=PASSWORD)
    Image.new("RGB", (3001, 2003), "green").save(tmp_path / "in.png")
    opened(tab, tmp_path / "in.png")
    tab.page.locator("#tim-editor [data-part=size]").fill("5")
    tab.page.locator(CANVAS).click(position={"x": 50, "y": 50})
    mask = tab.mask()
    rows, columns = np.nonzero(mask)
    assert mask.shape == (2003, 3001)
    assert set(np.unique(mask)) == {0, 255}
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 <= 6
    tab.page.get_by_role("button", name="Undo").click()
    assert tab.page.evaluate("async () => (await timEditor.content())[1]") is None


def test_the_brush_by_keyboard(tab: Tab, tmp_path: Path) -> None:
    noise(tmp_path / "in.png", width=64, height=64)
    opened(tab, tmp_path / "in.png")
    tab.page.focus(CANVAS)
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Space"):
        tab.page.keyboard.press(key)
    rows, columns = np.nonzero(tab.mask())
    assert (round(float(columns.mean()) + 0.5), round(float(rows.mean()) + 0.5)) == (32 - 16 + 1, 32 - 16)


def test_outpainting_and_a_result_as_the_next_input(tab: Tab, tmp_path: Path) -> None:
    original = noise(tmp_path / "in.png", width=20, height=12)
    tab.fill("a", width=8, height=8, Steps=1)
    opened(tab, tmp_path / "in.png")
    for side, count in (("Left", 4), ("Top", 0), ("Right", 6), ("Bottom", 2)):
        put(tab.page.get_by_label(side, exact=True), str(count))
    tab.draw()
    drawn = pixels(tab.downloads(tmp_path)[0])
    assert drawn.shape == (14, 30, 3)
    assert np.array_equal(drawn[:12, 4:24], original)
    tab.page.locator("#tim-stage").get_by_role("button", name="Use as input").click()
    tab.page.get_by_text("30 × 14 pixels, and so is the result.", exact=False).wait_for()
    (tmp_path / "broken.png").write_bytes(b"x" * 100)
    tab.page.set_input_files("#tim-editor input[type=file]", tmp_path / "broken.png")
    tab.page.get_by_text("broken.png: cannot be read as an image").wait_for()


def test_a_result_is_used_before_the_section_was_opened(tab: Tab) -> None:
    tab.fill("a", width=24, height=9, Steps=1)
    tab.draw()
    tab.page.locator("#tim-stage").get_by_role("button", name="Use as input").click()
    tab.page.get_by_text("24 × 9 pixels, and so is the result.", exact=False).wait_for()


def test_undo_redo_clear_and_invert(tab: Tab, tmp_path: Path) -> None:
    noise(tmp_path / "in.png", width=64, height=48)
    opened(tab, tmp_path / "in.png")
    canvas, page = tab.page.locator(CANVAS), tab.page
    page.locator("#tim-editor [data-part=size]").fill("8")
    for position in ({"x": 40, "y": 40}, {"x": 200, "y": 100}):
        canvas.click(position=position)  # pyright: ignore[reportArgumentType]
    both = tab.mask()
    tab.says(f"{round(100 * float((both > 0).mean()))} % is painted and drawn anew, the rest stays.")
    page.get_by_role("button", name="Undo").click()
    one = tab.mask()
    assert 0 < (one > 0).sum() < (both > 0).sum()
    page.get_by_role("button", name="Redo").click()
    assert np.array_equal(tab.mask(), both)
    page.get_by_role("button", name="Invert mask").click()
    assert np.array_equal(tab.mask(), 255 - both)
    page.get_by_role("button", name="Clear mask").click()
    tab.says("Nothing is painted: all of it changes.")
    page.focus(CANVAS)
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    assert np.array_equal(tab.mask(), both)
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+y")
    assert np.array_equal(tab.mask(), both)
    page.locator("#tim-editor [data-part=erase]").check()
    canvas.click(position={"x": 200, "y": 100})
    assert np.array_equal(tab.mask(), one)


def test_the_image_and_its_mask_outlive_a_closed_section(tab: Tab, tmp_path: Path) -> None:
    original = noise(tmp_path / "in.png", width=64, height=48)
    tab.fill("a", width=8, height=8, Steps=1)
    opened(tab, tmp_path / "in.png")
    tab.page.locator(CANVAS).click(position={"x": 40, "y": 40})
    mask = tab.mask()
    tab.page.get_by_role("button", name="Change an image").click()
    tab.page.wait_for_selector(CANVAS, state="hidden")
    tab.says("There is an image to change: it gives the size.")
    tab.draw()
    drawn = pixels(tab.downloads(tmp_path)[0])
    assert np.array_equal(drawn[mask == 0], original[mask == 0])
    tab.page.get_by_role("button", name="Change an image").click()
    tab.page.get_by_role("button", name="Remove image").click()
    assert tab.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Image to change"
    assert not tab.page.get_by_text("There is an image to change", exact=False).is_visible()
    tab.draw()
    assert pixels(tab.downloads(tmp_path)[0]).shape == (8, 8, 3)


def test_limits_are_told_before_a_request(tab: Tab, tmp_path: Path) -> None:
    Image.new("RGB", (301, 10)).save(tmp_path / "wide.png")
    tab.page.get_by_role("button", name="Change an image").click()
    tab.page.set_input_files("#tim-editor input[type=file]", tmp_path / "wide.png")
    tab.says("wide.png: 301 × 10: the limit is 300 pixels a side")
    (tmp_path / "heavy.png").write_bytes(bytes(1_000_001))
    tab.page.set_input_files("#tim-editor input[type=file]", tmp_path / "heavy.png")
    tab.says("heavy.png: the limit of a file is 1 MB")
    noise(tmp_path / "in.png", width=64, height=48)
    tab.page.set_input_files("#tim-editor input[type=file]", tmp_path / "in.png")
    put(tab.page.get_by_label("Left", exact=True), "30")
    tab.says("64 × 48 pixels; the result has 94 × 48.")
    put(tab.page.get_by_label("Left", exact=True), "300")
    tab.says("With its borders 364 × 48: the limit is 300 pixels a side")
    put(tab.page.get_by_label("Left", exact=True), "30")
    tab.page.locator(CANVAS).click(position={"x": 20, "y": 20})
    tab.says("A mask and borders exclude each other")


def test_painting_by_touch(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    tab = open_tab(width=390, height=844, has_touch=True)
    noise(tmp_path / "in.png", width=64, height=48)
    opened(tab, tmp_path / "in.png")
    box = tab.page.locator(CANVAS).bounding_box()
    assert box is not None
    assert box["width"] <= 390
    tab.page.locator(CANVAS).tap(position={"x": box["width"] / 2, "y": box["height"] / 2})
    rows, columns = np.nonzero(tab.mask())
    assert (round(float(columns.mean()) + 0.5), round(float(rows.mean()) + 0.5)) == (32, 24)
