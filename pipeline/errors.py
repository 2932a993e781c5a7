"""Errors in words."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    return " ".join(str(error).split())[:200]
