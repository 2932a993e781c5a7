"""One browser for all tests of the page, on the server of the folder above. Each test gets tabs of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.launch.serving.page.tab import Tab
from tests.launch.serving.server import Server

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser: Browser, server: Server) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, each of a visitor of its own. A request to another server, or an error in the page, fails the test."""
    problems: list[str] = []
    contexts: list[BrowserContext] = []

    def watch(page: Page) -> None:
        page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else problems.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))

    def opened(*, width: int = 1280, height: int = 900, has_touch: bool = False) -> Tab:
        context = browser.new_context(viewport={"width": width, "height": height}, has_touch=has_touch)
        contexts.append(context)
        context.on("page", watch)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(server.url)
        page.wait_for_selector("#tim-prompt textarea")
        return Tab(page)

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()
