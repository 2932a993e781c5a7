"""One browser for all tests of the page, on the server of the folder above. Each test gets tabs of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.launch.serving.page.tab import PROMPT, Tab
from tests.launch.serving.server import Server, started
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import TINY_CLASSES, tiny_network
from tim.model_folder.folder import save_model

PASSWORD = "a secret: ü"

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model of classes behind a password."""
    folder = tmp_path_factory.mktemp("serve") / "classes" / "model"
    save_model(folder, tiny_network(TINY_CLASSES).state_dict(), replace(SPEC, network=TINY_CLASSES, text=None))
    with started(folder, environment={"TIM_PASSWORD": PASSWORD}) as server:
        yield server


@pytest.fixture
def open_tab(browser: Browser, server: Server) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, each of a visitor of its own. A request to another server, or an error in the page or its console, fails the test.

    at: another server than the usual one; expected: a pattern of errors in the console that are right.
    """
    problems: list[str] = []
    contexts: list[BrowserContext] = []

    def opened(
        *,
        width: int = 1280,
        height: int = 900,
        at: Server = server,
        expected: str | None = None,
        password: str | None = None,
        **options: Any,
    ) -> Tab:
        def watch(page: Page) -> None:
            page.on("request", lambda request: None if request.url.startswith((at.url, "data:", "blob:")) else problems.append(request.url))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if is_wrong(message) else None)

        def is_wrong(message: ConsoleMessage) -> bool:
            return message.type == "error" and not (expected and re.search(expected, message.text))

        credentials: Any = None if password is None else {"username": "any", "password": password}
        context = browser.new_context(viewport={"width": width, "height": height}, http_credentials=credentials, **options)
        contexts.append(context)
        context.on("page", watch)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(at.url)
        page.wait_for_selector(PROMPT)
        return Tab(page)

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()
