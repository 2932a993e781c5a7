"""The page by keyboard alone, on a phone, without other servers, and without paths of the machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.launch.serving.page.tab import Tab
from tests.launch.serving.server import Server

# A control without a name that a screen reader can say.
UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, select, canvas, a[href]')]
  .filter(each => each.offsetParent !== null && !each.closest('[aria-hidden=true]'))
  .filter(each => !(each.getAttribute('aria-label') || each.title || each.innerText?.trim() || each.labels?.length
    || each.closest('label')?.innerText.trim()))
  .map(each => each.outerHTML.slice(0, 200))"""
FOCUSED = """(() => {
  const focused = document.activeElement;
  return focused.id || focused.closest('[id^=tim-]')?.id || focused.getAttribute('aria-label') || focused.tagName;
})()"""


def test_by_keyboard_alone(tab: Tab) -> None:
    page = tab.page
    page.focus("#tim-prompt textarea")
    page.keyboard.type("a fox")
    order = []
    for _ in range(20):
        page.keyboard.press("Tab")
        order.append(page.evaluate(FOCUSED))
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).boxShadow")
        assert shown != "nonenone", order[-1]
        if order[-1] in ("tim-width", "tim-height"):
            page.keyboard.press("Control+a")
            page.keyboard.type("12" if order[-1] == "tim-width" else "10")
        if order[-1] == "tim-stop":
            break
    places = [order.index(name) for name in ("tim-width", "tim-height", "tim-draw", "tim-stop")]
    assert places == sorted(places)
    page.keyboard.press("Control+Enter")
    tab.wait_for_images("")
    page.focus("#tim-width input")
    page.keyboard.press("Control+a")
    page.keyboard.type("300")
    page.focus("#tim-height input")
    page.keyboard.press("Control+a")
    page.keyboard.type("300")
    page.focus("#tim-prompt textarea")
    page.keyboard.press("Enter")
    page.get_by_text("Drawing", exact=False).first.wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.").first.wait_for()


def test_on_a_phone(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(width=390, height=844, has_touch=True)
    for section in ("Change an image", "Compare", "Negative prompt"):
        tab.page.get_by_role("button", name=section).click()
    tab.fill("a fox " * 40, width=300, height=20, Steps=1, Count=2)
    tab.draw()
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 390
    for control in ("#tim-draw", "#tim-stop", "#tim-width input", "#tim-height input", "#tim-compare", ".tim-card a[download]"):
        box = tab.page.locator(control).first.bounding_box()
        assert box is not None
        assert box["x"] >= 0, control
        assert box["x"] + box["width"] <= 390, control
        assert box["width"] >= 60, control
        assert box["height"] >= 28, control


def test_every_control_has_a_name_and_no_link_leads_elsewhere(tab: Tab, server: Server) -> None:
    for section in ("Change an image", "Compare", "Negative prompt"):
        tab.page.get_by_role("button", name=section).click()
    tab.fill("a", width=8, height=8, Steps=1)
    tab.draw()
    assert tab.page.evaluate(UNNAMED) == []
    links = tab.page.evaluate("[...document.querySelectorAll('a[href]')].map(each => each.href)")
    assert links
    assert [link for link in links if not link.startswith(server.url)] == []
    assert tab.page.get_attribute("[role=status][aria-live=polite]", "role") == "status"


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css"])
def test_nothing_of_the_machine_or_of_other_servers_is_in_the_page(server: Server, path: str) -> None:
    answer = server.get(path)
    text = answer.body.decode()
    assert answer.status == 200
    assert "/tmp" not in text
    assert "/home" not in text
    assert "/root" not in text
    for other in ("googleapis", "gstatic", "cdnjs", "jsdelivr", "gradio.s3", "huggingface.co", "analytics.gradio"):
        assert other not in text
