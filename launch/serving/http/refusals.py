"""Answers in place of the application's, and the headers of every answer."""

from __future__ import annotations

import json
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

from launch.serving.http.clients import path_of

_REFERENCE = ("/docs", "/openapi.json")
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


class Refusal(NamedTuple):
    """An answer in place of the application's."""

    status: int
    sentence: str
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> bytes:
        """As every error of the server: {"error": sentence}."""
        return json.dumps({"error": self.sentence}).encode()

    def messages(self) -> tuple[Message, Message]:
        """As messages of ASGI."""
        body = self.body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), *self.headers]
        raw = [(name.lower().encode(), value.encode()) for name, value in headers]
        return {"type": "http.response.start", "status": self.status, "headers": raw}, {"type": "http.response.body", "body": body}


FAILED = Refusal(500, "the server failed; its log has the reason")


def is_api(path: str) -> bool:
    """Whether a path is of the API or its reference, not of the page."""
    return path.startswith("/api/") or path in _REFERENCE


def busy(status: int, sentence: str, *, seconds: int) -> Refusal:
    """A refusal for now. seconds: after which the request may be repeated."""
    return Refusal(status, sentence, (("Retry-After", str(seconds)),))


class Sender:
    """Sends the application's answer with the headers of every answer. refusal: what takes the place of that answer."""

    def __init__(self, send: Send, *, path: str) -> None:
        self._send = send
        self._is_api = is_api(path)
        self._has_begun = self._is_replaced = False
        self.refusal: Refusal | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._has_begun:
            headers = Headers(raw=message["headers"])
            if message["status"] >= 500 and not headers.get("content-type", "").startswith("application/json"):
                self.refusal = self.refusal or FAILED
            if self.refusal is not None:
                await self.refuse(self.refusal)
        if not self._is_replaced:
            await self._pass(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, unless an answer has begun."""
        if not self._has_begun:
            self._is_replaced = True
            for message in refusal.messages():
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


async def refuse(refusal: Refusal, scope: Scope, send: Send) -> None:
    """Answer a request that the application does not see."""
    await Sender(send, path=path_of(scope)).refuse(refusal)
