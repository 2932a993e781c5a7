"""Drawing on the page: exact sizes, files with settings, errors as sentences, Stop, two tabs, a comparison, and the history."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.sampling.files.image_files import read_settings
from tests.launch.serving.page.tab import CLOSED, Tab, pixels, put

OpenTab = Callable[..., Tab]


def test_images_have_the_size_and_the_settings_that_were_asked_for(tab: Tab, tmp_path: Path) -> None:
    prompt = "${1+1} {{value}} <b>"
    tab.fill(prompt, width=37, height=11, Steps=2, Count=2, Seed=7)
    tab.draw()
    files = tab.downloads(tmp_path)
    assert [pixels(path).shape for path in files] == [(11, 37, 3)] * 2
    found = [read_settings(path) for path in files]
    assert [(each.prompt, each.steps, each.seed) for each in found] == [(prompt, 2, 7), (prompt, 2, 8)]
    assert re.fullmatch(r"2 images in [\d.]+ s, 4 evaluations, [\d.]+ GB of memory, seed 7\.", tab.status)
    assert tab.page.inner_text(".tim-card .tim-prompt >> nth=0") == prompt


def test_a_size_by_aspect_ratio(tab: Tab, tmp_path: Path) -> None:
    tab.fill("a", width=1, height=1, Steps=1)
    tab.page.get_by_label("Aspect ratio", exact=True).first.check()
    put(tab.page.get_by_label("Megapixels", exact=False), "0.001")
    tab.page.get_by_text("40 × 26 pixels, exactly").wait_for()
    tab.page.get_by_role("button", name="Swap sides").click()
    tab.page.get_by_text("26 × 40 pixels, exactly").wait_for()
    tab.draw()
    assert pixels(tab.downloads(tmp_path)[0]).shape == (40, 26, 3)


def test_what_is_wrong_is_said_in_a_sentence(tab: Tab) -> None:
    wrong = [
        ({"width": 99999, "height": 8}, "width and height 99999x8: the limit is 300 pixels a side"),
        ({"width": 0, "height": 8}, "'width': input should be greater than or equal to 1, not 0"),
        ({"width": 8, "height": 8, "Steps": 1000}, "steps 1000: the limit is 200"),
        ({"width": 8, "height": 8, "Steps": 1.5}, "'steps': input should be a valid integer, not 1.5"),
        ({"width": 8, "height": 8, "Steps": 1, "Count": 99}, "count: the request asks for 99 images, the limit is 16"),
        ({"width": 8, "height": 8, "Count": 1, "Seed": "x"}, "seed 'x': give a whole number, or leave it empty for a new one"),
    ]
    for controls, sentence in wrong:
        tab.fill("a", **controls)  # pyright: ignore[reportArgumentType]
        assert tab.error() == sentence
    tab.fill("a", width=8, height=8, Seed="")
    tab.draw()
    assert not tab.page.locator(".tim-error").count()


def test_stop_and_a_second_drawing(tab: Tab) -> None:
    tab.fill("a", width=160, height=160, Steps=128)
    tab.page.click("#tim-draw")
    tab.page.wait_for_selector(".tim-previews img")
    assert re.fullmatch(r"Drawing image, step \d+ of 128 …", tab.status)
    tab.page.click("#tim-stop")
    tab.page.get_by_text("Stopped.").first.wait_for()
    tab.fill("a", width=8, height=8, Steps=1)
    tab.draw()
    assert tab.page.locator(".tim-card").count() == 1


def test_two_tabs_do_not_mix(open_tab: OpenTab, tmp_path: Path) -> None:
    first, second = open_tab(), open_tab()
    first.fill("a fox", width=20, height=10, Steps=4, Count=3)
    second.fill("a lake", width=10, height=20, Steps=4, Count=2)
    first.page.click("#tim-draw")
    second.draw()
    first.wait_for_images("")
    for tab, prompt, shape, count in ((first, "a fox", (10, 20, 3), 3), (second, "a lake", (20, 10, 3), 2)):
        files = tab.downloads(tmp_path)
        assert [pixels(path).shape for path in files] == [shape] * count
        assert {read_settings(path).prompt for path in files} == {prompt}
        assert tab.page.locator(".tim-history li").count() == count


def test_closing_a_tab_cancels_its_request(open_tab: OpenTab) -> None:
    closed, other = open_tab(expected=CLOSED), open_tab()
    closed.fill("a", width=256, height=256, Steps=128)
    closed.page.click("#tim-draw")
    closed.page.wait_for_selector(".tim-previews img")
    closed.page.close()
    other.fill("a", width=8, height=8, Steps=1)
    other.draw()  # 128 steps of that size would take longer than the wait


def test_a_comparison(tab: Tab, tmp_path: Path) -> None:
    tab.fill("a", width=8, height=8, Seed=3)
    tab.page.get_by_role("button", name="Compare").click()
    section = tab.page.locator("#tim-comparing")
    for label, text in (("Steps", "1, x"), ("Guidance", "1, 2"), ("Sizes", "12x8, 8x12")):
        put(section.get_by_label(label, exact=False), text)
    assert tab.error("#tim-compare") == "Steps 1,x: 'x' is not a whole number; write for example Steps 1,2,4,8"
    section.get_by_label("Steps", exact=False).fill("1, 2")
    tab.draw("#tim-compare")
    tab.page.locator(".tim-singles summary").click()
    found = [read_settings(path) for path in tab.downloads(tmp_path)]
    settings = {(each.width, each.height, each.steps, each.guidance, each.seed) for each in found}
    assert settings == {(*size, steps, guidance, 3) for size in ((12, 8), (8, 12)) for steps in (1, 2) for guidance in (1.0, 2.0)}
    with tab.page.expect_download() as download:
        tab.page.get_by_role("link", name="Download the grid").click()
    assert min(pixels(Path(download.value.path())).shape[:2]) > 2 * 192
    assert "4 × 2 images" in (tab.page.get_attribute(".tim-grid img", "alt") or "")


@pytest.mark.parametrize("source", ["history", "file"])
def test_parameters_are_loaded(tab: Tab, tmp_path: Path, source: str) -> None:
    tab.fill("a red fox", width=24, height=16, Steps=3, Guidance=2, Seed="")
    tab.draw()
    (file,) = tab.downloads(tmp_path)
    tab.fill("other", width=8, height=8, Steps=1, Guidance=1, Seed=1)
    if source == "history":
        tab.page.locator(".tim-history button").first.click()
    else:
        tab.page.set_input_files("#tim-drop input[type=file]", file)
    tab.says("Loaded the parameters")
    tab.page.wait_for_function("document.querySelector('#tim-prompt textarea').value == 'a red fox'")
    assert tab.seed == str(read_settings(file).seed)
    before = pixels(file)
    tab.draw()
    assert np.array_equal(pixels(tab.downloads(tmp_path)[0]), before)
    (tmp_path / "broken.png").write_bytes(b"x" * 100)
    tab.page.set_input_files("#tim-drop input[type=file]", tmp_path / "broken.png")
    tab.page.locator("#tim-status .tim-error").wait_for()
    assert tab.status.startswith("broken.png: ")
    assert str(tmp_path) not in tab.page.content()
