"""Counts by name for notes: at most ten names and a count of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

MAX_NAMES = 10  # in a note
_MAX_HELD = 1000  # names with their own count
_MAX_CHARACTERS = 60  # of a name in a note
_REST = ""


class BoundedCounter:
    """A counter with bounded memory: beyond a thousand different names, further ones share one count."""

    __slots__ = ("_counts",)

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self._counts: Counter[str] = Counter(counts or {})

    def add(self, name: str, count: int = 1) -> None:
        has_own_count = name in self._counts or len(self._counts) < _MAX_HELD
        self._counts[name if has_own_count else _REST] += count

    def total(self) -> int:
        return self._counts.total()

    def counts(self) -> dict[str, int]:
        """Name → count, most frequent first; the shared count under ""."""
        return dict(sorted(self._counts.items(), key=lambda item: (item[0] == _REST, -item[1], item[0])))

    def __str__(self) -> str:
        """ "12 .svg, 3 .zip and 7 of 4 other kinds": most frequent first, at most ten names."""
        counts = self.counts()
        named = [(name, count) for name, count in counts.items() if name != _REST][:MAX_NAMES]
        text = ", ".join(f"{count} {printable(name)}" for name, count in named)
        rest = self.total() - sum(count for _, count in named)
        kinds = len(counts) - len(named)
        return f"{text} and {rest} of {kinds} other kind(s)" if rest else text


def listed(names: Iterable[str], *, count: int) -> str:
    """ "a, b, … (12)": the first ten of `count` names, in one line."""
    named = [printable(name) for name, _ in zip(names, range(MAX_NAMES), strict=False)]
    return ", ".join(named) + (f" and {count - len(named)} more" if count > len(named) else "")


def printable(name: str) -> str:
    """A name as one line of valid UTF-8, truncated if it is long."""
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"
