"""Which addresses besides those of the API are served: of gradio those that the page needs.

gradio has others, for uploads, files of the machine, and editing.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serving.http.clients import path_of
from launch.serving.http.refusals import Refusal, refuse

_UNKNOWN = Refusal(404, "no such address: see /docs")
_ROUTES = {
    "GET": re.compile(
        r"/|/(docs|openapi\.json|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static)/(?!.*\.\.)[\w./@+-]+"
        r"|/gradio_api/(queue/data|heartbeat/\w+)",
        re.ASCII,
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|run/\w+|cancel|reset)", re.ASCII),
}
_WITH_QUERY = "/gradio_api/queue/data"  # elsewhere a query may name what gradio looks for among its files
_SENTENCES = {
    400: "the page sent what the server cannot read; reload it",
    404: _UNKNOWN.sentence,
    405: "this address is not for that method",
    422: "the page sent what the server cannot read; reload it",
    503: "the server is busy; try again",
}


class PageRoutes:
    """An ASGI application around another. Errors of the page's addresses are {"error": sentence}, as those of the API."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope).startswith("/api/"):
            await self._app(scope, receive, send)
        elif (allowed := _ROUTES.get(scope["method"])) is None or not allowed.fullmatch(path_of(scope)):
            await refuse(_UNKNOWN, scope, send)
        else:
            query = scope["query_string"] if path_of(scope) == _WITH_QUERY else b""
            await self._app({**scope, "query_string": query}, receive, _WithoutDetails(send))


class _WithoutDetails:
    """Sends an answer; an error without its details, which repeat what was sent and may name files."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._is_replaced = True
            status = message["status"]
            headers = Headers(raw=message["headers"])
            kept = tuple((name, headers[name]) for name in ("allow", "retry-after") if name in headers)
            for part in Refusal(status, _SENTENCES.get(status, "the server failed; its log has the reason"), kept).messages():
                await self._send(part)
        elif not self._is_replaced:
            await self._send(message)
