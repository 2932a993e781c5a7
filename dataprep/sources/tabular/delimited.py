"""Read CSV and TSV files. A stray quotation mark affects at most its own row; every line is part of a row or reported.

Rules, line by line (lines end with `\\n`, `\\r\\n` or `\\r`):

- A line without an open quoted field is a row; it needs as many fields as the header. A quotation mark inside an unquoted field is an
  ordinary character.
- A quoted field that is open at the end of its line continues to the next line with an odd number of quotation marks, if the lines up to
  there form a record by RFC 4180 with as many fields as the header. Otherwise the first line is a bad row, and reading continues with the
  next line.
- If the line that would close the record could also begin one, the interpretation is used that has an image in the columns in which the
  table's first rows have one, and nowhere else. If both or none do, the chain of such lines decides: an even number of lines forms
  multi-line records; with an odd number, the first line has a stray quotation mark.
- Lines that are complete rows, with an image in the same column, are never the inside of a field.
- A column whose name is repeated in the header is read as `NAME_2`.
- TSV as defined by IANA has no quoting: a line whose quotation marks do not enclose whole fields is split at its tabs, and lines with as
  many tabs as the header are never the inside of a field.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import BinaryIO

from pipeline.corpus.record_fields import IMAGE_EXTENSIONS
from pipeline.corpus.text_decoding import find_undecodable, open_text

MAX_LINE_BYTES = 16 << 20  # of a line; also the limit for a multi-line record, in characters
_PEEK = 100  # lines read to find the columns that name images
_MAX_LINKS = 100  # lines in a chain of ambiguous lines
_IMAGE = re.compile(rf"https?://\S+|\S.*\.({'|'.join(IMAGE_EXTENSIONS)})", re.IGNORECASE)
_INSIDE = re.compile(rf"\S\.({'|'.join(IMAGE_EXTENSIONS)})\b", re.IGNORECASE)
_ENDS = "\r\n"

DelimitedRow = tuple[int, "dict[str, str] | str"]


def read_delimited(stream: BinaryIO, *, delimiter: str = ",", encoding: str = "") -> Iterator[DelimitedRow]:
    """(number of the row's first line, from 1; the row by column name, or the problem of the line)"""
    return _Reader(stream, delimiter=delimiter, encoding=encoding).rows()


def read_header(stream: BinaryIO, *, delimiter: str = ",", encoding: str = "") -> list[str]:
    """The names in the header, [] if it cannot be read."""
    return _Reader(stream, delimiter=delimiter, encoding=encoding).header()[0]


class _Lines:
    """The lines of a text, with lookahead. `number`: that of the first line, from 1. A line that is too long is cut."""

    def __init__(self, stream: BinaryIO, *, encoding: str) -> None:
        self._text, self.codec = open_text(stream, encoding=encoding)
        self._ahead: deque[str] = deque()
        self.number = 1

    def __getitem__(self, index: int) -> str | None:
        """The line `index` lines after the first one, None after the end."""
        while len(self._ahead) <= index:
            line = self._text.readline(MAX_LINE_BYTES + 1)
            if not line:
                return None
            rest = line
            while len(rest) > MAX_LINE_BYTES and rest[-1] not in _ENDS:
                rest = self._text.readline(MAX_LINE_BYTES + 1)
            self._ahead.append(line)
        return self._ahead[index]

    def span(self, start: int, end: int) -> list[str]:
        """The lines from `start` to `end`, inclusive."""
        return list(islice(self._ahead, start, end + 1))

    def drop(self, count: int) -> None:
        self.number += count
        for _ in range(count):
            self._ahead.popleft()


class _Reader:
    def __init__(self, stream: BinaryIO, *, delimiter: str, encoding: str) -> None:
        self._lines = _Lines(stream, encoding=encoding)
        self._delimiter = delimiter
        self._is_stated = bool(encoding)
        plain, quoted = f'[^"{delimiter}\r\n]*', '"[^"]*(?:""[^"]*)*"'
        self._record = re.compile(rf"(?:{quoted}|{plain})(?:{delimiter}(?:{quoted}|{plain}))*(?:\r\n|\r|\n)?")
        self._width: int | None = None
        self._images: list[int] = []
        csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_LINE_BYTES))

    def header(self) -> tuple[list[str], str]:
        """(names, problem)"""
        while (first := self._lines[0]) is not None and not first.strip():
            self._lines.drop(1)
        if first is None:
            return [], ""
        row, used = self._row(first)
        self._lines.drop(used)
        if isinstance(row, str):
            return [], f"the header cannot be read: {row}"
        names = [name.strip() for name in row]
        self._width = len(names)
        self._images = self._image_columns()
        return [_numbered(name, before=names[:index]) for index, name in enumerate(names)], ""

    def rows(self) -> Iterator[DelimitedRow]:
        names, problem = self.header()
        if problem:
            yield 1, problem
            return
        while (first := self._lines[0]) is not None:
            number = self._lines.number
            if not first.strip(_ENDS):
                self._lines.drop(1)
                continue
            row, used = self._row(first)
            self._lines.drop(used)
            if isinstance(row, str):
                yield number, row
            elif len(row) != len(names):
                yield number, f"{len(row)} columns where the header has {len(names)}"
            else:
                yield number, {name: value for name, value in zip(names, row, strict=True) if name}

    def _row(self, first: str) -> tuple[list[str] | str, int]:
        """(the row that begins with the first line, or its problem; number of lines used)"""
        problem = self._problem(first)
        if problem:
            return problem, 1
        if '"' not in first:
            return first.rstrip(_ENDS).split(self._delimiter), 1
        try:
            return self._parse([first]), 1
        except csv.Error as error:
            message = str(error)
        end = self._end() if first.count('"') % 2 else 0
        if end:
            lines = self._lines.span(0, end)
            number = self._lines.number
            for index, line in enumerate(lines):
                if problem := self._problem(line):
                    return f"{problem} (line {number + index} of a row in lines {number} to {number + end})", end + 1
            return self._parse(lines), end + 1
        if self._delimiter == "\t":
            return first.rstrip(_ENDS).split("\t"), 1
        is_open = first.count('"') % 2 and "end of data" in message
        return "a quotation mark that is never closed; reading went on with the next line" if is_open else f"not CSV: {message}", 1

    def _parse(self, lines: list[str]) -> list[str]:
        """Raises csv.Error."""
        return next(csv.reader(lines, strict=True, delimiter=self._delimiter), [])

    def _problem(self, line: str) -> str:
        if len(line) > MAX_LINE_BYTES:
            return f"a line of more than {MAX_LINE_BYTES} characters"
        if "\0" in line:
            remedy = "" if self._is_stated else "; if this is UTF-16, say columns.encoding=utf-16-le"
            return f"a NUL at character {line.index(chr(0))}{remedy}"
        return find_undecodable(line, codec=self._lines.codec, is_stated=self._is_stated)

    def _end(self) -> int:
        """Index of the line that closes the record of the first line, 0 if its quotation mark is stray."""
        links: list[tuple[int, bool]] = []
        start = 0
        while len(links) < _MAX_LINKS and (link := self._link(start)):
            links.append(link)
            start = link[0]
        if not links or self._are_rows(links[0][0]):
            return 0
        fits = [names_image for _, names_image in links[:2]]
        is_record = fits[0] if len(fits) == 2 and fits[0] != fits[1] else len(links) % 2
        return links[0][0] if is_record else 0

    def _link(self, start: int) -> tuple[int, bool] | None:
        """(index of the line that closes a multi-line record beginning at `start`, whether the record has images in the usual columns);
        None if there is no such record."""
        end, size = start + 1, 0
        while (line := self._lines[end]) is not None and line.count('"') % 2 == 0:
            end, size = end + 1, size + len(line)
            if size > MAX_LINE_BYTES:
                return None
        if line is None:
            return None
        lines = self._lines.span(start, end)
        if not self._record.fullmatch("".join(lines)):
            return None
        row = self._parse(lines)
        if self._width not in (None, len(row)):
            return None
        return end, self._names_image(row)

    def _names_image(self, row: list[str]) -> bool:
        """Whether a multi-line record has images in the image columns, and nowhere else."""
        named = [column for column, cell in enumerate(row) if _IMAGE.fullmatch(cell)]
        others = (cell for column, cell in enumerate(row) if column not in named)
        has_images = set(self._images) <= set(named) if self._images else bool(named)
        return has_images and not any(_INSIDE.search(cell) for cell in others)

    def _image_columns(self) -> list[int]:
        """The columns that name an image in most of the next lines that are complete rows."""
        count, named = 0, Counter[int]()
        for index in range(_PEEK):
            line = self._lines[index]
            if line is None:
                break
            with suppress(csv.Error):
                row = self._parse([line])
                if len(row) == self._width:
                    count += 1
                    named.update(column for column, cell in enumerate(row) if _IMAGE.fullmatch(cell))
        return [column for column in sorted(named) if named[column] > count / 2]

    def _are_rows(self, end: int) -> bool:
        """Whether all lines after the first one, up to `end`, are complete rows."""
        first, *others = (line.rstrip(_ENDS).split(self._delimiter) for line in self._lines.span(0, end))
        if any(len(row) != self._width for row in others):
            return False
        images = [column for column, cell in enumerate(first) if _IMAGE.fullmatch(cell)]
        is_enough = self._delimiter == "\t" and len(first) > 1
        return is_enough or any(all(_IMAGE.fullmatch(row[column]) for row in others) for column in images)


def _numbered(name: str, *, before: list[str]) -> str:
    """Number repeated names: `caption`, `caption_2`."""
    count = before.count(name)
    return f"{name}_{count + 1}" if name and count else name
