from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from launch.serving.http.bodies import BodyLimits
from launch.serving.http.guard import Guard
from launch.serving.http.password import WRONG_PER_MINUTE, Password
from launch.serving.limits import Busy, Rate
from tests.launch.serving.server import base64_of


async def _length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def _fails(request: Request) -> PlainTextResponse:
    raise RuntimeError("/home/secret/model.safetensors is damaged")


def client(password: Password | None = None) -> TestClient:
    app = Starlette(routes=[Route("/", _length, methods=["GET", "POST"]), Route("/fails", _fails)])
    return TestClient(
        Guard(app, hosts=["Draws.Example"], password=password, limits=BodyLimits(1000, 1000)), base_url="http://localhost:7860"
    )


HOSTS = {
    "localhost": True,
    "LOCALHOST:1": True,
    "127.0.0.1:7860": True,
    "[::1]:7860": True,
    "192.168.0.7": True,
    "draws.example:80": True,
    "evil.example": False,
    "localhost.evil.example": False,
    "127.0.0.1.evil.example": False,
    "": False,
    "[": False,
}


@pytest.mark.parametrize(("host", "is_ours"), HOSTS.items())
def test_only_our_host_names(host: str, is_ours: bool) -> None:
    assert client().get("/", headers={"Host": host}).status_code == (200 if is_ours else 403)


ORIGINS = {
    "http://localhost:7860": True,
    "https://localhost:7860": True,
    "http://localhost:7861": False,
    "http://localhost": False,
    "http://evil.example": False,
    "null": False,
    "": False,
    "http://localhost:7860.evil.example": False,
    "http://[": False,
}


@pytest.mark.parametrize(("origin", "is_ours"), ORIGINS.items())
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_only_our_origin(origin: str, is_ours: bool, method: str) -> None:
    answer = client().request(method, "/", headers={"Origin": origin})
    assert answer.status_code == (200 if is_ours else 403)
    assert is_ours or answer.json()["error"]


def test_every_answer_has_the_headers() -> None:
    for path in ("/", "/fails", "/nothing"):
        headers = client().get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "same-origin"
        assert "http" not in headers["content-security-policy"]


def test_no_websocket_is_opened() -> None:
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/", headers={"Host": "localhost:7860"}):
        pass


def test_head_is_get_without_a_body() -> None:
    assert client().head("/").status_code == 200


def test_an_exception_is_a_sentence_without_its_message() -> None:
    answer = client().get("/fails")
    assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log has the reason"})


def test_bodies_have_a_limit_whatever_their_header_says() -> None:
    assert client().post("/", content=b"x" * 1000).text == "1000"
    assert client().post("/", content=b"x" * 1001).status_code == 413
    assert client().post("/", content=iter([b"x" * 600] * 2)).status_code == 413
    assert client().post("/", content=b"", headers={"Content-Length": "-5"}).status_code == 413


@given(typed=st.text() | st.binary().map(lambda each: base64_of(b"a:" + each)), scheme=st.sampled_from(["Basic", "basic", "Bearer", ""]))
def test_only_the_password_is_accepted(typed: str, scheme: str) -> None:
    password = Password("pass:word")
    expected = scheme.lower() == "basic" and typed.strip() == base64_of(b"a:pass:word")
    assert password.accepts(f"{scheme} {typed}", client="a") is expected
    assert password.accepts("Basic " + base64_of(b"anyone:pass:word"), client="a")
    assert not password.accepts(None, client="a")


def test_wrong_passwords_are_limited_by_client() -> None:
    password = Password("x")
    for _ in range(WRONG_PER_MINUTE):
        assert not password.accepts("Basic " + base64_of(b"a:y"), client="one")
    with pytest.raises(Busy, match="more than 10 wrong passwords in a minute"):
        password.accepts("Basic " + base64_of(b"a:x"), client="one")
    assert password.accepts("Basic " + base64_of(b"a:x"), client="two")
    refused = client(password).get("/", headers={"Authorization": "Basic eQ=="})
    assert (refused.status_code, refused.json()) == (401, {"error": "a password is needed"})


def test_a_rate_forgets_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("launch.serving.limits.time.monotonic", lambda: now)
    rate = Rate(2, what="requests")
    rate.take("a")
    now += 30
    rate.take("a")
    with pytest.raises(Busy, match="more than 2 requests in a minute: try again in 30 s"):
        rate.take("a")
    rate.take("b")
    now += 30.5
    rate.take("a")
