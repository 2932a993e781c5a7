"""The protocol of connections, in a server of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from launch.serving.http import connections as connections_module
from launch.serving.http.bodies import BodyLimits
from launch.serving.http.connections import Connection
from launch.serving.http.guard import Guard

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def _hello(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.05)
    return PlainTextResponse("hello")


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections_module, "HEAD_SECONDS", 0.5)
    protocol: Any = partial(Connection, most_of_a_client=3)
    app = Guard(Starlette(routes=[Route("/", _hello, methods=["GET", "POST"])]), hosts=(), password=None, limits=BodyLimits(100, 100))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()
    listener.close()


def connected(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=30)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    content = b""
    while part := connection.recv(65_536):
        content += part
    return content


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_that_does_not_come_is_not_waited_for(address: tuple[str, int], begun: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(begun)
        assert all_of(connection) == b""


def test_the_second_head_of_a_connection_has_the_same_time(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(GET)
        answer = b""
        while b"hello" not in answer:  # its parts may come one after the other
            part = connection.recv(65_536)
            assert part
            answer += part
        connection.sendall(GET[:10])
        assert all_of(connection) == b""


def test_requests_one_after_the_other_and_at_once(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(GET * 3)
        assert all_of(connection).count(b"hello") == 3


def test_what_is_no_http_is_a_sentence(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"the request is not valid HTTP" in answer
    with connected(address) as connection:
        connection.sendall(GET + b"no http\r\n\r\n")
        assert b"hello" in all_of(connection)


def test_connections_of_a_client_are_limited(address: tuple[str, int]) -> None:
    idle = [connected(address) for _ in range(3)]
    with connected(address) as connection:
        connection.sendall(GET)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 5" in answer.lower()
    assert b"the server has too many connections; try again" in answer
    for each in idle:
        each.close()


def test_a_body_of_any_length_is_refused_and_not_received(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        try:
            while sent < 10**10:
                connection.sendall(b"fff0\r\n" + b"x" * 0xFFF0 + b"\r\n")
                sent += 0xFFF0
        except OSError:
            pass
        assert 0 < sent < 10**10


def test_a_refused_body_is_answered_at_once(address: tuple[str, int]) -> None:
    with connected(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n")
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the body of a request has at most" in answer
