"""The history: download, use as input, delete, and images that the server dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.launch.serving.page.tab import Tab, pixels


def test_what_can_be_done_with_an_image_of_the_history(tab: Tab, tmp_path: Path) -> None:
    tab.fill("a red fox", width=24, height=16, Steps=1, Count=3, Seed=5)
    tab.draw()
    items = tab.page.locator(".tim-history li")
    items.nth(2).wait_for()
    with tab.page.expect_download() as download:
        items.nth(1).get_by_role("link", name="Download: a red fox, 24 × 16 · 1 step · guidance 1 · seed 6").click()
    assert download.value.suggested_filename.startswith("0000-a-red-fox-24x16-steps1-cfg1-seed6")
    assert pixels(Path(download.value.path())).shape == (16, 24, 3)

    items.nth(1).get_by_role("button", name="Delete").focus()
    tab.page.keyboard.press("Enter")
    tab.says("Deleted from the history.")
    tab.page.wait_for_function("document.querySelectorAll('.tim-history li').length == 2")
    assert [text.split("seed ")[1].split()[0] for text in items.all_inner_texts()] == ["5", "7"]
    assert (tab.page.evaluate("document.activeElement.getAttribute('aria-label')") or "").endswith("seed 7")  # the next one's Delete

    items.nth(0).get_by_role("button", name="Use as input").click()
    tab.says("24 × 16 pixels, and so is the result.")
    tab.fill("a lake", width=24, height=16, Steps=1, Count=1, Seed=1)
    tab.draw()
    tab.page.wait_for_function("document.querySelectorAll('.tim-history li').length == 3")
    for _ in range(3):
        count = items.count()
        items.first.get_by_role("button", name="Delete").click()
        tab.page.wait_for_function("count => document.querySelectorAll('.tim-history li').length == count - 1", arg=count)
    tab.says("Images of this tab are listed here.")


def test_an_image_that_the_server_dropped(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(expected="404")
    tab.fill("a", width=8, height=8, Steps=1)
    tab.draw()
    tab.page.route("**/api/images/*", lambda route: route.fulfill(status=404))
    tab.page.locator(".tim-history").get_by_role("button", name="Use as input").click()
    tab.says("The server does not keep that image any more.")
