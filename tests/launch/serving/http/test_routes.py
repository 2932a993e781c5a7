"""Every address of the server, also those of gradio: none is open without the password or to another site, and none is unknown to us."""

from __future__ import annotations

import gc
import json
import re
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from launch.sampling.recorded import ModelFacts
from launch.serving.app import application, unguarded
from launch.serving.http.password import Password
from launch.serving.limits import Limits
from launch.serving.studio import Studio
from tests.launch.serving.server import base64_of
from tim import Generator

HEADERS = {"Host": "localhost:7860"}
RIGHT = {**HEADERS, "Authorization": "Basic " + base64_of(b"a:geheim")}
SECRET = re.compile(r"Traceback|File \"|/tmp/|/root/|/work/|/home/|site-packages|\.py\b")
PAGE = {
    *("/", "/config", "/theme.css", "/manifest.json", "/robots.txt", "/favicon.ico", "/assets/x", "/static/x", "/gradio_api/heartbeat/x"),
    *("/gradio_api/queue/data", "/gradio_api/queue/join", "/gradio_api/run/x", "/gradio_api/cancel", "/gradio_api/reset"),
}
ENDLESS = "/gradio_api/heartbeat/x"


class Address(NamedTuple):
    method: str
    path: str


@pytest.fixture(scope="module")
def studio(model: Path) -> Iterator[Studio]:
    studio = Studio(Generator.from_pretrained(model, device="cpu"), ModelFacts("first", "0" * 64, (), "fp32", "cpu"), limits=Limits())
    yield studio
    studio.close(seconds=60)


@pytest.fixture(scope="module")
def client(studio: Studio) -> Iterator[TestClient]:
    app = application(studio, hosts=(), password=Password("geheim"))
    with TestClient(app, base_url="http://localhost:7860", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def addresses(studio: Studio) -> set[Address]:
    """Every method and path, parameters filled in, and methods that no route has."""
    routes = list(_routes(unguarded(studio)))
    found = {
        Address(method, re.sub(r"\{[^}]*\}", "x", path)) for path, methods in routes for method in (*methods, "OPTIONS", "TRACE", "PUT")
    }
    assert {"/api/draw", "/docs", "/gradio_api/upload", "/gradio_api/file=x", "/monitoring"} <= {each.path for each in found}
    return found


def _routes(app: FastAPI) -> Iterator[tuple[str, set[str]]]:
    for context in iter_route_contexts(app.routes):
        inner = getattr(context.original_route, "app", None)
        if isinstance(inner, FastAPI):
            yield from _routes(inner)
        else:
            yield context.path or "/", getattr(context, "methods", None) or {"GET"}


def refused(client: TestClient, address: Address, headers: Mapping[str, str], *, status: int) -> None:
    answer = client.request(address.method, address.path, headers=headers)
    assert answer.status_code == status, address
    if address.method != "HEAD":
        assert list(answer.json()) == ["error"], address


def test_no_address_answers_without_the_password(client: TestClient, addresses: set[Address]) -> None:
    for address in addresses:
        refused(client, address, HEADERS, status=401)


def test_no_address_answers_to_another_host_or_site(client: TestClient, addresses: set[Address]) -> None:
    for address in addresses:
        refused(client, address, {**RIGHT, "Host": "evil.example"}, status=403)
        refused(client, address, {**RIGHT, "Origin": "http://evil.example"}, status=403)


def test_of_gradio_only_what_the_page_needs_is_served(client: TestClient, addresses: set[Address]) -> None:
    for address in addresses:
        if address.path not in PAGE and not address.path.startswith(("/api/", "/docs", "/openapi.json")):
            refused(client, address, RIGHT, status=404)


def test_errors_of_all_addresses_have_one_form_and_no_secrets(client: TestClient, addresses: set[Address]) -> None:
    for address in addresses:
        if address.path == ENDLESS or (address.method == "GET" and address.path == "/gradio_api/queue/data"):
            continue
        for body in (
            None,
            b"",
            b"{",
            b"[]",
            b"{}",
            b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "fn_index": 3}',
        ):
            answer = client.request(address.method, address.path, content=body, headers={**RIGHT, "Content-Type": "application/json"})
            assert not SECRET.search(answer.text) or address.path in ("/", "/config"), (address, answer.text[:500])
            if answer.status_code >= 400 and address.method != "HEAD":
                assert list(answer.json()) == ["error"], (address, answer.text[:500])
            if body is None and address.method in ("GET", "HEAD"):
                break


REFUSED = {"/api/draw": json.dumps({"prompt": "a", "steps": 1, "image": "A" * 2_000_000}).encode(), "/api/parameters": b"x" * 2_000_000}


@pytest.mark.parametrize("path", REFUSED)
def test_a_refused_file_is_not_kept(client: TestClient, path: str) -> None:
    headers = {**RIGHT, "Content-Type": "application/json"}

    def refuse() -> None:
        assert client.post(path, content=REFUSED[path], headers=headers).status_code == 422

    refuse()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(5):
            refuse()
        assert tracemalloc.get_traced_memory()[0] < 2_000_000
    finally:
        tracemalloc.stop()
        gc.enable()


TRAVERSALS = [
    "/static/../../../etc/passwd",
    "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/assets/..%2f..%2f..%2fetc/passwd",
    "/static//etc/passwd",
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file/etc/passwd",
    "/svelte/..%5c..%5cx",
    "/api/images/..%2f..%2fetc%2fpasswd.png",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_file_of_the_machine_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path, headers=RIGHT)
    assert answer.status_code in (403, 404, 422)
    assert list(answer.json()) == ["error"]
