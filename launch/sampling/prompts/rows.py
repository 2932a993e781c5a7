"""One prompt of a list, with the settings that its row has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.arguments import parse_sizes
from launch.sampling.files.settings import MAX_SEED
from launch.sampling.prompts.aspect import checked_size

MAX_COUNT = 100_000  # images of one prompt
PROMPT, ID = ("prompt", "text", "caption"), ("id", "item_id", "file_name")  # names of columns, the first one found counts
KEYS = (*PROMPT, *ID, "class", "negative", "width", "height", "size", "aspect", "megapixels", "seed", "steps", "guidance", "count")
_WHOLE = re.compile(r"[+-]?\d{1,25}(?:\.0*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, text or class, and its own settings; None: those of the command.

    place: where it stands, for messages. id: its name in a benchmark. size: (height, width) in pixels. record: the whole row as read.
    second, share: a prompt to mix in, and how much of it.
    """

    prompt: str | int
    place: str
    id: str | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    count: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    second: str | int | None = None
    share: float = 0.0


def prompt_row(record: Mapping[str, Any], *, place: str) -> PromptRow:
    """The prompt in a row of a table. Texts may hold numbers, as in CSV. None, NaN and empty texts count as missing, except in the prompt.

    Raises:
        ValueError: no prompt, or a value that is not valid; names the place and the key.
    """
    row = _Row(record, place=place)
    return PromptRow(
        prompt=row.prompt(),
        place=place,
        id=row.name(),
        negative=row.text("negative"),
        size=row.size(),
        seed=row.whole("seed", low=0, high=MAX_SEED),
        steps=row.whole("steps", low=1, high=1_000_000),
        guidance=row.number("guidance"),
        count=row.whole("count", low=1, high=MAX_COUNT),
        record=record,
    )


def argument_rows(prompts: Sequence[str | int]) -> list[PromptRow]:
    """Prompts and classes of the command line. Raises ValueError for a text that is not UTF-8."""
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        place = f"{'prompt' if isinstance(prompt, str) else 'class'} number {number}"
        rows.append(PromptRow(check_text(prompt, what=place) if isinstance(prompt, str) else prompt, place))
    return rows


def check_text(text: str, *, what: str) -> str:
    """Return a prompt. Raises ValueError, naming `what`, if it has bytes that are no UTF-8, which Python holds as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: is not UTF-8 at character {error.start}; save the text as UTF-8") from error
    return text


class _Row:
    """The typed values of a row."""

    def __init__(self, record: Mapping[str, Any], *, place: str) -> None:
        self._record = record
        self._place = place

    def prompt(self) -> str | int:
        named = next((name for name in PROMPT if self._record.get(name) is not None), None)
        number = self.whole("class", low=0, high=1 << 31)
        if named is None and number is None:
            keys = ", ".join(map(repr, self._record))[:200] or "none"
            raise ValueError(f"{self._place}: has no key prompt (or class); its keys are {keys}")
        if named is not None and number is not None:
            raise ValueError(f"{self._place}: has the keys {named} and class; give one of them")
        return number if number is not None else self._text_of(str(named))

    def name(self) -> str | None:
        name = next((name for name in ID if not self._is_missing(name)), None)
        if name is None:
            return None
        value = self._record[name]
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self._text_of(name)

    def text(self, key: str) -> str | None:
        return None if self._is_missing(key) else self._text_of(key)

    def whole(self, key: str, *, low: int, high: int) -> int | None:
        if self._is_missing(key):
            return None
        value = self._record[key]
        number = math.nan
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, float) and value.is_integer():
            number = int(value)
        elif isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
            number = int(value.strip().partition(".")[0])
        if not low <= number <= high:
            raise self._wrong(key, f"expected a whole number from {low} to {high}")
        return int(number)

    def number(self, key: str) -> float | None:
        """A finite number of at least 0."""
        if self._is_missing(key):
            return None
        value = self._record[key]
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number < 0:
            raise self._wrong(key, "expected a number of at least 0")
        return number

    def size(self) -> tuple[int, int] | None:
        """(height, width): of `size`, of `width` and `height`, or of `aspect` and `megapixels`."""
        forms = [("size",), ("width", "height"), ("aspect", "megapixels")]
        given = [keys for keys in forms if any(not self._is_missing(key) for key in keys)]
        if not given:
            return None
        if len(given) > 1:
            raise ValueError(f"{self._place}: has the keys {given[0][0]} and {given[1][0]}; give one size")
        missing = [key for key in given[0] if self._is_missing(key)]
        if missing:
            raise ValueError(f"{self._place}: has no key {missing[0]}; {given[0][0]} and {given[0][1]} go together")
        try:
            return self._size(given[0])
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(self._place) else f"{self._place}: {message}") from error

    def _size(self, keys: tuple[str, ...]) -> tuple[int, int]:
        if keys == ("aspect", "megapixels"):
            megapixels = self.number("megapixels")
            assert megapixels is not None
            return checked_size(str(self._record["aspect"]), megapixels=megapixels, names=("aspect", "megapixels"))
        if keys == ("width", "height"):
            width, height = (self.whole(key, low=1, high=1 << 31) for key in keys)
            return parse_sizes(f"{width}x{height}", option="width and height")[0]
        sizes = parse_sizes(str(self._record["size"]), option="size")
        if len(sizes) != 1:
            raise self._wrong("size", "expected one size, such as 512x128")
        return sizes[0]

    def _text_of(self, key: str) -> str:
        value = self._record[key]
        if not isinstance(value, str):
            raise self._wrong(key, "expected a text")
        return check_text(value, what=f"{self._place}: {key}")

    def _is_missing(self, key: str) -> bool:
        value = self._record.get(key)
        return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))

    def _wrong(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self._place}: {key} is {self._record[key]!r:.60}; {expected}")
