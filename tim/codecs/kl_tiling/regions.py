"""Parts of an image: spans of rows and columns, tiles, and how far a layer reads beyond its output."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from tim.codecs.base import Span


class Region(NamedTuple):
    """A rectangle of an image or of a layer's output, in its own rows and columns."""

    rows: Span
    columns: Span

    def within(self, outer: Region) -> tuple[slice, slice]:
        """This region as slices of the last two dimensions of a tensor that holds `outer`."""
        return self.rows.within(outer.rows), self.columns.within(outer.columns)


class Shape(NamedTuple):
    """Shape of a layer's output."""

    channels: int
    height: int
    width: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return self.channels * self.height * self.width

    @property
    def region(self) -> Region:
        """All of it."""
        return Region(Span(0, self.height), Span(0, self.width))


def split(length: int, side: int) -> list[Span]:
    """`length` rows or columns in the fewest spans of at most `side`, as equal as possible."""
    count = -(-length // side)
    edges = [length * i // count for i in range(count + 1)]
    return [Span(*edge) for edge in pairwise(edges)]


def tiles(shape: Shape, side: int) -> Iterator[Region]:
    """Tiles of at most `side` × `side`, row by row. They cover a layer's output without overlap."""
    columns = split(shape.width, side)
    return (Region(rows, each) for rows in split(shape.height, side) for each in columns)


def crop(values: Tensor, held: Region, wanted: Region) -> Tensor:
    """The part `wanted` of values (…, h, w) that are those of region `held`: a view."""
    rows, columns = wanted.within(held)
    return values[..., rows, columns]
