"""Contrast in light and dark, what screen readers say, widths from a phone to 200 % zoom, and no motion where it is not wanted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.launch.serving.page.tab import PROMPT, Tab

OpenTab = Callable[..., Tab]

# Texts whose contrast with what is behind them is below WCAG 2.2's 4.5 to 1 (3 to 1 where they are large).
FAINT = """() => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    const layers = [];
    for (let each = element; each; each = each.parentElement) {
      const colour = rgba(getComputedStyle(each).backgroundColor);
      layers.push(colour);
      if (colour[3] === 255) break;
    }
    return layers.reverse().reduce((below, [r, g, b, a]) => [r, g, b].map((c, k) => (c * a + below[k] * (255 - a)) / 255), [255, 255, 255]);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const check = (element, style, text) => {
    const [light, dark] = [luminance(rgba(style.color)), luminance(behind(element))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${text.slice(0, 40)}`);
  };
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest("[aria-disabled=true]")) continue;
    const own = [...element.childNodes].filter((each) => each.nodeType === 3).map((each) => each.data.trim()).join("");
    if (own) check(element, getComputedStyle(element), own);
    if (element.value && element.matches("input:not([type=range], [type=radio], [type=checkbox]), textarea"))
      check(element, getComputedStyle(element), element.value);
    if (element.placeholder) check(element, getComputedStyle(element, "::placeholder"), element.placeholder);
  }
  return found;
}"""
OVERFLOW = """() => [...document.querySelectorAll("button, input, textarea, canvas, .tim-card, .tim-status, label")]
  .filter((each) => each.checkVisibility() && !each.closest(".tim-frame") && each.getBoundingClientRect().width > 0)
  .filter((each) => each.getBoundingClientRect().left < -1 || each.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((each) => each.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_tab: OpenTab, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme)
    for section in ("Change an image", "Compare", "Negative prompt"):
        tab.page.get_by_role("button", name=section).click()
    tab.fill("a fox", width=32, height=16, Steps=1)
    tab.draw()
    assert tab.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    tab.page.wait_for_timeout(300)  # transitions of colours
    assert tab.page.evaluate(FAINT) == []
    tab.fill("a fox", width=301, height=16)
    tab.says("Size 301x16: the limit is 300 pixels a side")
    tab.error()
    assert tab.page.evaluate(FAINT) == []


def test_what_a_screen_reader_says(tab: Tab) -> None:
    script = """() => {
      window.said = [];
      const watch = (region) => new MutationObserver(() => region.textContent && window.said.push([region.role, region.textContent]))
        .observe(region, { childList: true });
      document.querySelectorAll(".tim-said").forEach(watch);
    }"""
    tab.page.evaluate(script)
    tab.fill("a fox", width=40, height=30, Steps=40)
    tab.draw()
    tab.fill("a fox", width=8, height=8, Steps=1000)
    tab.error()
    tab.page.wait_for_function("window.said.some(([role]) => role == 'alert')")
    said = tab.page.evaluate("window.said")
    assert 2 <= len(said) <= 4  # of 40 steps one is said, perhaps after the place in the queue
    assert [role for role, _ in said[:-1]] == ["status"] * (len(said) - 1)
    assert said[-2][1].startswith("1 image in ")
    assert said[-1] == ["alert", "steps 1000: the limit is 200"]
    assert tab.page.locator("#tim-status[aria-live]").count() == 0


@pytest.mark.parametrize("width", [320, 640, 768, 1024])
def test_nothing_is_cut_off(open_tab: OpenTab, width: int) -> None:
    """640: 1280 at a zoom of 200 %; 320: at 400 %, which WCAG 2.2 asks for."""
    tab = open_tab(width=width, height=700)
    for section in ("Change an image", "Compare", "Negative prompt"):
        tab.page.get_by_role("button", name=section).click()
    tab.fill("a fox " * 20, width=300, height=40, Steps=1, Count=2)
    tab.draw()
    tab.page.locator("#tim-stage").get_by_role("button", name="Use as input").first.click()
    tab.says("300 × 40 pixels, and so is the result.")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == width
    assert tab.page.evaluate(OVERFLOW) == []


def test_nothing_moves_when_the_image_is_finished(tab: Tab) -> None:
    tab.fill("a fox", width=200, height=40, Steps=12)
    tab.page.click("#tim-draw")
    preview = tab.page.wait_for_selector(".tim-previews img")
    assert preview is not None
    before = preview.bounding_box()
    tab.wait_for_images("")
    assert tab.page.locator(".tim-card img").bounding_box() == before


def test_an_error_is_in_sight(open_tab: OpenTab) -> None:
    tab = open_tab(width=768, height=600)
    tab.page.get_by_role("button", name="Change an image").click()
    tab.fill("a fox", width=8, height=8, Steps=1000)
    tab.page.locator("#tim-draw").scroll_into_view_if_needed()
    tab.page.mouse.wheel(0, 400)
    tab.page.wait_for_function("scrollY >= 300")
    tab.error()
    box = tab.page.locator(".tim-status").bounding_box()
    assert box is not None
    assert 0 <= box["y"] < 100
    borders = [tab.page.get_by_label(side, exact=True).bounding_box() for side in ("Left", "Top", "Right", "Bottom")]
    assert len({round(each["y"]) for each in borders if each}) in (1, 2)  # rows
    assert min(each["width"] for each in borders if each) >= 45


def test_motion_can_be_reduced(open_tab: OpenTab) -> None:
    tab = open_tab(reduced_motion="reduce", width=390, height=700)
    tab.fill("a fox", width=8, height=8, Steps=1)
    durations = (
        "[...document.querySelectorAll('*')].map(each => parseFloat(getComputedStyle(each).transitionDuration)).filter(each => each > 0.01)"
    )
    assert tab.page.evaluate(durations) == []
    tab.page.press(PROMPT, "Enter")
    tab.wait_for_images("")
