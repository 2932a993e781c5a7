"""Format exceptions as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DetailedError(RuntimeError):
    """A failure with details besides its message: `lines` for people, `data` for programs."""

    def __init__(self, message: str, *, lines: tuple[str, ...], data: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.lines = lines
        self.data = data


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """The message as one line of at most `limit` characters, or the exception type if it has no message."""
    return _message(error)[:limit] or type(error).__name__


def kind_and_line(error: BaseException, *, limit: int = 300) -> str:
    """Type and message as one line of at most `limit` characters, for exceptions whose message alone is not enough."""
    return ": ".join(part for part in (type(error).__name__, _message(error)) if part)[:limit]


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())
