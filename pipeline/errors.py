"""Errors in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DetailedError(RuntimeError):
    """A failure with more to say than its message: `lines` for people, `data` for programs."""

    def __init__(self, message: str, *, lines: tuple[str, ...], data: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.lines = lines
        self.data = data


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """The message of an error in one line of at most `limit` characters; its class name if the message is empty."""
    return _words(error)[:limit] or type(error).__name__


def kind_and_line(error: BaseException, *, limit: int = 300) -> str:
    """The class name and the message of an error in one line of at most `limit` characters."""
    return ": ".join(part for part in (type(error).__name__, _words(error)) if part)[:limit]


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())
