"""Limits of the bodies of requests while they are received: bytes, values of JSON, time, and how many large ones at a time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from launch.serving.http.clients import client_of, path_of
from launch.serving.http.refusals import Refusal, busy

SECONDS = 30.0  # that a body may take, plus one for each of these many bytes
_BYTES_PER_SECOND = 50_000
_LARGE, _LARGE_BODIES, _OF_A_CLIENT = 1_000_000, 4, 2  # bytes, and how many such bodies are received at a time, of all and of one client
_FILES = ("/api/parameters",)  # whose bodies are no JSON


class Refused(Exception):
    """A body that exceeds a limit while it is received."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.sentence)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of a body: its bytes, and its values, which take many times their bytes when they are parsed."""

    max_bytes: int
    max_values: int


class Bodies:
    """Receives bodies within limits."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._large: Counter[str] = Counter()  # by client

    def too_large(self, scope: Scope) -> Refusal | None:
        """A refusal of a body that its header says is too large, before any of it is received."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) <= self._limits.max_bytes:
            return None
        return self._too_large()

    def receiver(self, scope: Scope, receive: Receive) -> Body:
        """Receives the body of one request. To be closed."""
        return Body(self, receive, client=client_of(HTTPConnection(scope)), is_json=path_of(scope) not in _FILES)

    def check(self, body: Body) -> None:
        """Raises Refused for a body that exceeds a limit."""
        if body.received > self._limits.max_bytes:
            raise Refused(self._too_large())
        if body.values > self._limits.max_values:
            raise Refused(Refusal(413, f"the body of a request has at most {self._limits.max_values:,} values"))
        if body.received > _LARGE and not body.is_large:
            if self._large.total() >= _LARGE_BODIES or self._large[body.client] >= _OF_A_CLIENT:
                raise Refused(busy(429, "too many uploads at a time; try again", seconds=2))
            body.is_large = True
            self._large[body.client] += 1

    def release(self, body: Body) -> None:
        """Make room for another large body."""
        if body.is_large:
            body.is_large = False
            self._large[body.client] -= 1
            self._large += Counter()  # forgets clients without one

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body of a request has at most {self._limits.max_bytes / 1e6:.0f} MB")


@dataclass(slots=True)
class Body:
    """The body of one request. received: bytes so far; values: of JSON, at least as many as there are."""

    bodies: Bodies
    receive: Receive
    client: str
    is_json: bool
    received: int = 0
    values: int = 0
    is_large: bool = False
    _is_complete: bool = False
    _began: float = field(default_factory=time.monotonic)

    async def __call__(self) -> Message:
        """The next message of ASGI. Raises Refused."""
        if self._is_complete:
            return await self.receive()
        left = self._began + SECONDS + self.received / _BYTES_PER_SECOND - time.monotonic()
        try:
            message = await asyncio.wait_for(self.receive(), timeout=max(0.0, left))
        except asyncio.TimeoutError:
            raise Refused(Refusal(408, f"the body of a request has to arrive within {SECONDS:g} s; send it again")) from None
        content = message.get("body", b"")
        self.received += len(content)
        if self.is_json:
            self.values += sum(map(content.count, (b",", b"[", b"{")))
        self.bodies.check(self)
        if not message.get("more_body", False):
            self._is_complete = True
            self.close()
        return message

    def close(self) -> None:
        """The body is not received any further."""
        self.bodies.release(self)
