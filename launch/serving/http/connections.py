"""Connections: how many there may be, and how long one may take to send the head of a request. uvicorn limits neither by client."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from launch.serving.http.refusals import Refusal, busy, refuse

log = logging.getLogger(__name__)

MOST = 512  # connections; what is above is answered by a refusal, and above twice as many by nothing
OF_A_CLIENT = 256
HEAD_SECONDS = 10.0  # also for the rest of a body that was refused
_MALFORMED = Refusal(400, "the request is not valid HTTP")


class Connection(H11Protocol):
    """uvicorn's protocol with limits. most_of_a_client: connections of one address."""

    def __init__(self, *arguments: Any, most_of_a_client: int = OF_A_CLIENT, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._most_of_a_client = most_of_a_client
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > 2 * MOST:
            transport.abort()
            return
        address = self.client[0] if self.client else ""
        clients = [each.client for each in self.connections if isinstance(each, H11Protocol) and each.client]
        same = sum(client[0] == address for client in clients)
        if len(self.connections) > MOST or same > self._most_of_a_client:
            self.app = _overloaded
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        try:
            super().data_received(data)
        except h11.LocalProtocolError as error:  # an answer to what is no HTTP, in the middle of another answer
            log.debug("a connection was closed: %s", error)
            self.transport.abort()
        self._watch()

    def on_response_complete(self) -> None:
        """An answer has been sent."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer to what is no HTTP, in the form of every error."""
        headers = [("content-type", "application/json"), ("connection", "close")]
        response = h11.Response(status_code=_MALFORMED.status, headers=headers, reason="Bad Request")
        for event in (response, h11.Data(data=_MALFORMED.body()), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Close the connection if no request is in hand and none begins in time."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections above the limit."""
    refusal = busy(503, "the server has too many connections; try again", seconds=5)
    await refuse(refusal._replace(headers=(*refusal.headers, ("Connection", "close"))), scope, send)
