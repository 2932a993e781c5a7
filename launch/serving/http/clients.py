"""Who sends a request, and under which address: a proxy that is trusted says it for its clients, and nobody else.

A client has limits of its own. It is known by its address; of IPv6 by the first 64 bits, because it may choose the others.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_FORWARDED = (b"x-forwarded-", b"forwarded", b"x-gradio-")  # gradio believes them
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")


class Clients:
    """An ASGI application around another, which sees the client, the scheme and the path that a trusted proxy forwards.

    proxies: addresses whose headers X-Forwarded-For, -Host, -Proto and -Prefix count. Those of others are removed.
    """

    def __init__(self, app: ASGIApp, *, proxies: Collection[str]) -> None:
        self._app = app
        self._proxies = {client_name(proxy) for proxy in proxies}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(self._known(scope) if scope["type"] == "http" else scope, receive, send)

    def _known(self, scope: Scope) -> Scope:
        address, port = scope.get("client") or ("", 0)
        client, headers = client_name(address), Headers(scope=scope)
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if not name.lower().startswith(_FORWARDED)]}
        if client in self._proxies:
            client = self._behind_proxy(headers.getlist("x-forwarded-for")) or client
            if host := headers.get("x-forwarded-host", "").partition(",")[0].strip():
                scope["headers"] = [
                    *((name, value) for name, value in scope["headers"] if name != b"host"),
                    (b"host", host.encode("latin-1")),
                ]
            if headers.get("x-forwarded-proto", "").strip() == "https":
                scope["scheme"] = "https"
            prefix = headers.get("x-forwarded-prefix", "").strip().rstrip("/")
            if _PREFIX.fullmatch(prefix):
                path = scope["path"]
                scope |= {"root_path": prefix, "path": path if path.startswith(f"{prefix}/") else prefix + path}
        return {**scope, "client": (client, port)}

    def _behind_proxy(self, forwarded: Collection[str]) -> str:
        """The last address that is no proxy of ours: those before it are only what the client says."""
        names = [client_name(each.strip()) for line in forwarded for each in line.split(",")]
        return next((name for name in reversed(names) if name not in self._proxies), "")[:64]


def client_of(request: Any) -> str:
    """Whose limits a request counts for: the address of its client, "" if it has none. request: of starlette or gradio."""
    return request.client.host if request.client else ""


def client_name(address: str) -> str:
    """`"::ffff:10.0.0.1"` → `"10.0.0.1"`, `"2001:db8::7"` → `"2001:db8::/64"`; what is no address stays."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv4Address):
        return str(known)
    if known.ipv4_mapped is not None:
        return str(known.ipv4_mapped)
    return str(known) if known.is_loopback else str(ipaddress.ip_network((known, 64), strict=False))


def is_address(name: str) -> bool:
    """Whether a host is an address of IPv4 or IPv6, not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def path_of(scope: Scope) -> str:
    """The path of a request without the prefix of a proxy."""
    return scope["path"].removeprefix(scope.get("root_path", ""))
