"""Parameters from files: of A1111, of other models, and of images without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.sampling.files.exif import exif_with_comment
from launch.sampling.files.formats import image_format
from launch.sampling.files.image_files import write_image
from tests.launch.sampling.files.test_settings import FULL
from tests.launch.serving.page.tab import PROMPT, Tab

A1111 = """a red fox, snow
Negative prompt: a dog
Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 965400086, Size: 200x120, Model hash: 1a2b, Model: sd v1, \
Denoising strength: 0.7, Clip skip: 2, Version: v1.10"""


def dropped(tab: Tab, path: Path) -> str:
    """Drop a file on the zone for parameters; the status line after it."""
    before = tab.status
    tab.page.set_input_files("#tim-drop input[type=file]", path)
    tab.page.wait_for_function("before => document.querySelector('.tim-status').innerText != before", arg=before)
    return tab.status


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_of_a1111_loads_what_is_known_and_the_rest_is_named(tab: Tab, tmp_path: Path, suffix: str) -> None:
    chunks = PngInfo()
    chunks.add_text("parameters", A1111)
    extra = {"pnginfo": chunks} if suffix == "png" else {"exif": exif_with_comment(A1111)}
    Image.new("RGB", (20, 12), "red").save(tmp_path / f"a.{suffix}", **extra)  # pyright: ignore[reportArgumentType]
    assert dropped(tab, tmp_path / f"a.{suffix}") == (
        f"Loaded the parameters of a.{suffix}: a red fox, snow. "
        "Not taken over: Sampler: Euler a; Schedule type: Karras; Model: sd v1; Clip skip: 2."
    )
    tab.page.wait_for_function("([where, text]) => document.querySelector(where).value == text", arg=[PROMPT, "a red fox, snow"])
    tab.page.get_by_role("button", name="Negative prompt").click()
    tab.page.get_by_role("button", name="Change an image").click()
    expected = {"Steps": "20", "Guidance": "6.5", "Seed": "965400086", "Strength": "0.7"}
    shown = {label: tab.page.locator("#tim-controls").get_by_label(label, exact=False).first.input_value() for label in expected}
    assert shown == expected
    assert [tab.page.input_value(f"#tim-{side} input") for side in ("width", "height")] == ["200", "120"]
    assert tab.page.get_by_placeholder("What guidance leads away from").input_value() == "a dog"


def test_what_this_server_has_not_is_named(tab: Tab, tmp_path: Path) -> None:
    foreign = replace(FULL, prompt="a", interval=(0.25, 0.5), model="other", model_digest="ab" * 32)
    write_image(tmp_path / "a.png", Image.new("RGB", (8, 8)), foreign, form=image_format("png"))
    said = dropped(tab, tmp_path / "a.png")
    for part in ("interval", "model: other", "LoRA", "image: choose it under Change an image", "times"):
        assert part in said
    write_image(tmp_path / "b.png", Image.new("RGB", (8, 8)), replace(foreign, prompt=3), form=image_format("png"))
    assert "class (this model draws prompts)" in dropped(tab, tmp_path / "b.png")


def test_an_image_without_parameters_says_so(tab: Tab, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert dropped(tab, tmp_path / "plain.png").startswith(
        "plain.png: has no settings of its drawing; give an image that tim or A1111 wrote"
    )
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    assert dropped(tab, tmp_path / "large.png") == "large.png: the limit of a file is 1 MB"


def test_a_file_that_is_dropped_beside_the_zones_does_not_leave_the_page(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    tab = open_tab()
    drop = """() => {
      const transfer = new DataTransfer();
      transfer.items.add(new File(["x"], "beside.png", { type: "image/png" }));
      const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
      document.querySelector("h1").dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    assert tab.page.evaluate(drop)
    tab.says("beside.png: not an image that can be read")
