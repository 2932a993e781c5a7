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


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length; what kind it is, if it says nothing."""
    return _words(error)[:200] or type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """What kind of error it is and what it says, in one line of bounded length: for those that say too little alone."""
    return ": ".join(part for part in (type(error).__name__, _words(error)) if part)[:300]


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())
