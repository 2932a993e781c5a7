"""The password of a server, sent by HTTP Basic authentication (RFC 7617), which browsers and curl know. Any user name is accepted."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from launch.serving.limits import Rate

WRONG_PER_MINUTE = 10  # of one client


class Password:
    """Compares in constant time. A client that is often wrong has to wait, also with the right one."""

    def __init__(self, password: str) -> None:
        self._digest = _digest(password.encode())
        self._wrong = Rate(WRONG_PER_MINUTE, what="wrong passwords")

    def accepts(self, authorization: str | None, *, client: str) -> bool:
        """Whether a header has the password. Raises Busy if the client was wrong too often."""
        self._wrong.check(client)
        if authorization is None:
            return False
        scheme, _, credentials = authorization.partition(" ")
        try:
            typed = base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            typed = b""
        if scheme.lower() == "basic" and hmac.compare_digest(_digest(typed), self._digest):
            return True
        self._wrong.count(client)
        return False


def _digest(password: bytes) -> bytes:
    """Of equal length for all passwords, so that a comparison tells nothing of it."""
    return hashlib.sha256(password).digest()
