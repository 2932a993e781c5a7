"""What stands before every request: host, origin, password, size of the body; and the headers of every answer.

Host: a page of another site that lets its own name point to this machine (DNS rebinding) is refused. Origin: so is one that sends requests
here from a browser. A client needs no Origin.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.limits import Busy
from launch.serving.password import Password
from pipeline.errors import kind_and_line

log = logging.getLogger(__name__)

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_LARGE_BODY, _LARGE_BODIES = 1_000_000, 4  # bytes, and how many such bodies are received at a time
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_OF_API = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_OF_PAGE = (  # gradio's page has inline scripts, and builds functions from texts
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; media-src 'self' data: blob:; worker-src 'self' blob:; connect-src 'self' data: blob:; frame-src 'none'; "
    "object-src 'none'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_API_PATHS = ("/api/", "/docs", "/openapi.json")


class Refusal(NamedTuple):
    """An answer in place of the application's."""

    status: int
    sentence: str
    headers: tuple[tuple[str, str], ...] = ()


_FAILED = Refusal(503, "the server failed; its log has the reason")


class _TooLarge(Exception):
    """A body that exceeds the limit while it is received."""


class Guard:
    """An ASGI application around another. hosts: names by which clients may call this server, besides addresses."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], password: Password | None, max_body: int) -> None:
        self._app, self._password, self._max_body = app, password, max_body
        self._hosts = {host.lower() for host in (*LOOPBACK_NAMES, *hosts)}
        self._large = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _refuse(refusal, scope, send)
        elif scope["type"] == "websocket":
            await self._app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return Refusal(403, "this server does not answer to that host name; allow it with --allow-host NAME")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Refusal(403, "requests from pages of other sites are refused")
        if self._password is not None:
            client = (scope.get("client") or ("", 0))[0]
            try:
                if not self._password.accepts(headers.get("authorization"), client=client):
                    return Refusal(401, "a password is needed", (("WWW-Authenticate", 'Basic realm="tim", charset="UTF-8"'),))
            except Busy as busy:
                return Refusal(429, str(busy), (("Retry-After", str(busy.seconds)),))
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self._max_body:
            return self._too_large()
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. An address cannot be rebound, so any is accepted."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or _is_address(name)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body of a request has at most {self._max_body / 1e6:.0f} MB")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, with a limit of the body. Its exceptions are logged, and answered without their message."""
        headers = Headers(scope=scope)
        is_large = "transfer-encoding" in headers or int(headers.get("content-length", "0")) > _LARGE_BODY
        if is_large and self._large >= _LARGE_BODIES:
            await _refuse(Refusal(429, "too many uploads at a time; try again", (("Retry-After", "2"),)), scope, send)
            return
        sender = _Sender(send, path=scope["path"])
        self._large += is_large
        try:
            await self._app(scope, self._limited(receive, sender), sender)
        except _TooLarge:
            await sender.refuse(self._too_large())
        except Exception as error:
            log.warning("the server failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            await sender.refuse(_FAILED)
        finally:
            self._large -= is_large

    def _limited(self, receive: Receive, sender: _Sender) -> Receive:
        """Raises _TooLarge when a body exceeds the limit, whatever its header says. The application may answer to that as it likes."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                sender.refusal = self._too_large()
                raise _TooLarge
            return message

        return limited


class _Sender:
    """Sends the application's answer with the headers of every answer. refusal: what takes the place of that answer."""

    def __init__(self, send: Send, *, path: str) -> None:
        self._send = send
        self._is_api = path.startswith(_API_PATHS)
        self._has_begun = self._is_replaced = False
        self.refusal: Refusal | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._has_begun:
            headers = Headers(raw=message["headers"])
            if message["status"] >= 500 and not headers.get("content-type", "").startswith("application/json"):
                self.refusal = self.refusal or _FAILED
            if self.refusal is not None:
                await self.refuse(self.refusal)
        if not self._is_replaced:
            await self._pass(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, unless an answer has begun."""
        if not self._has_begun:
            self._is_replaced = True
            for message in _messages(refusal):
                await self._pass(message)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers["Content-Security-Policy"] = _OF_API if self._is_api else _OF_PAGE
            if self._is_api:
                headers["Cache-Control"] = "no-store"
        await self._send(message)


async def _refuse(refusal: Refusal, scope: Scope, send: Send) -> None:
    """Answer a request that the application does not see."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _Sender(send, path=scope["path"]).refuse(refusal)


def _messages(refusal: Refusal) -> tuple[Message, Message]:
    body = json.dumps({"error": refusal.sentence}).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), *refusal.headers]
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    return {"type": "http.response.start", "status": refusal.status, "headers": raw}, {"type": "http.response.body", "body": body}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
