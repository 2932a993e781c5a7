"""What stands before every request: host, origin, password, body. Exceptions become sentences.

Host: a page of another site that lets its own name point to this machine (DNS rebinding) is refused. Origin: so is one that sends requests
here from a browser. A client needs no Origin.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.http.bodies import Bodies, Body, BodyLimits, Refused
from launch.serving.http.clients import client_of, is_address, path_of
from launch.serving.http.password import Password
from launch.serving.http.refusals import FAILED, Refusal, Sender, busy, refuse
from launch.serving.limits import Busy
from pipeline.errors import kind_and_line

log = logging.getLogger(__name__)

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """An ASGI application around another. hosts: names by which clients may call this server, besides addresses."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], password: Password | None, limits: BodyLimits) -> None:
        self._app, self._password = app, password
        self._hosts = {host.lower() for host in (*LOOPBACK_NAMES, *hosts)}
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope)) is not None:
            await refuse(refusal, scope, send)
        else:
            await self._answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            return Refusal(403, "this server does not answer to that host name; allow it with --allow-host NAME")
        if origin is not None and _split(origin) != host.lower():
            return Refusal(403, "requests from pages of other sites are refused")
        if self._password is not None:
            client = client_of(HTTPConnection(scope))
            try:
                if not self._password.accepts(headers.get("authorization"), client=client):
                    return Refusal(401, "a password is needed", (("WWW-Authenticate", 'Basic realm="tim", charset="UTF-8"'),))
            except Busy as wait:
                return busy(429, str(wait), seconds=wait.seconds)
        return self._bodies.too_large(scope)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. An address cannot be rebound, so any is accepted."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or is_address(name)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, with limits of the body. Its exceptions are logged, and answered without their message."""
        sender, body = Sender(send, path=path_of(scope)), self._bodies.receiver(scope, receive)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        try:
            await self._app(scope, _noting_refusals(body, sender), sender)
        except Refused as refused:
            await sender.refuse(refused.refusal)
        except ClientDisconnect:
            log.debug("a client left while it sent its request")
        except Exception as error:
            log.warning("the server failed: %s", kind_and_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            await sender.refuse(FAILED)
        finally:
            body.close()


def _noting_refusals(body: Body, sender: Sender) -> Receive:
    """A refused body is what is answered, whatever the application makes of the exception."""

    async def receive() -> Message:
        try:
            return await body()
        except Refused as refused:
            sender.refusal = refused.refusal
            raise

    return receive


def _split(origin: str) -> str | None:
    """Host and port of an origin; None for one that has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
