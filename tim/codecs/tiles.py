"""Run a network of layers in tiles, with the same result as on the whole map.

An output cell of a layer depends on the input cells around it, up to the layer's halo. A tile is read with the halo that all layers
together need, and cropped after each layer to what the next one needs. Layers pad with zeros where a tile ends; these cells are cropped,
except at the border of the map, where the whole network pads, too. A global layer depends on the whole map through sums over its cells:
they are gathered in a pass over tiles of the stored map before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from torch import Tensor

from tim.codecs.base import Span

FLOAT = 4  # bytes
SMALLEST = 8  # cells of the coarser map per side of the smallest tiles: smaller ones would be little but halo


Read: TypeAlias = Callable[[Span, Span], Tensor]
"""Rows and columns of a map → (1, C, h, w)."""
Write: TypeAlias = Callable[[Span, Span, Tensor], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that depends on a neighbourhood.

    run: (1, C, h, w) → (1, channels, h·up/down, w·up/down). halo: input cells on each side of those under an output cell, which it also
    depends on. work: float32 numbers per input cell in memory at its peak, with input and output.
    """

    run: Callable[[Tensor], Tensor]
    halo: int
    channels: int
    work: float
    up: int = 1
    down: int = 1


class GlobalLayer(Protocol):
    """A layer that also depends on sums over all cells of a map. It keeps the size; `halo`, `channels` and `work` as in `Layer`."""

    halo: int
    channels: int
    work: float

    def features(self, x: Tensor) -> Tensor:
        """Map (1, C, h, w) → features (1, F, h, w), which depend on a neighbourhood."""
        ...

    def sums(self, features: Tensor) -> Tensor:
        """Sums over the cells of features."""
        ...

    def apply(self, x: Tensor, sums: Tensor | None = None) -> Tensor:
        """Output for a map or a part of it. sums: those of the whole map; None: x is the whole map."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """At most one global layer and the layers up to the next one, with the sizes of maps before, between and after them.

    layers: the global layer is the first of them, run on a whole map. splits: tiles per axis, at most.
    """

    layers: tuple[Layer, ...]
    first: GlobalLayer | None
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    splits: int

    def side(self) -> int:
        """Output cells per side of a tile: whole input cells."""
        scale = max(1, self.heights[-1] // self.heights[0])
        return -(-max(self.heights[-1], self.widths[-1]) // self.splits // scale) * scale

    def tiles(self) -> Iterator[tuple[Span, Span]]:
        """Rows and columns of the output tiles: squares, cut off at the end of the map."""
        side = self.side()
        for rows in _pieces(self.heights[-1], side):
            for columns in _pieces(self.widths[-1], side):
                yield rows, columns

    def bytes(self) -> float:
        """Peak memory of the largest tile."""
        side = self.side()
        lengths = [
            [
                max(span.length for span in spans)
                for spans in zip(*(needed(self.layers, piece, sizes) for piece in _pieces(sizes[-1], side)), strict=True)
            ]
            for sizes in (self.heights, self.widths)
        ]
        return FLOAT * max(layer.work * rows * columns for layer, rows, columns in zip(self.layers, *lengths, strict=False))

    def output_bytes(self) -> float:
        """Memory of the whole output map in float32."""
        return FLOAT * self.layers[-1].channels * self.heights[-1] * self.widths[-1]


@dataclass(frozen=True, slots=True)
class Plan:
    """Segments with their tiles, and the predicted peak memory in bytes: stored maps and the work on a tile."""

    segments: tuple[Segment, ...]
    bytes: float


def needed(layers: Sequence[Layer], span: Span, sizes: Sequence[int]) -> list[Span]:
    """The spans before, between and after layers that an output span depends on. sizes: of these maps."""
    spans = [span]
    for layer, size in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        start = (span.start // layer.up * layer.down - layer.halo) // layer.down * layer.down
        stop = -(-(-(-span.stop // layer.up) * layer.down + layer.halo) // layer.down) * layer.down
        span = Span(max(0, start), min(size, stop))
        spans.append(span)
    return spans[::-1]


def plan(layers: Sequence[Layer | GlobalLayer], height: int, width: int, *, memory: float) -> Plan:
    """Segments for a map of this size, each in as few tiles as `memory` bytes allow.

    If even the smallest tiles need more, the plan's `bytes` is above `memory`.
    """
    segments: list[Segment] = []
    stored = peak = 0.0
    groups = _groups(layers)
    for i, (first, local) in enumerate(groups):
        heights, widths = _sizes(local, height), _sizes(local, width)
        height, width = heights[-1], widths[-1]
        segment = Segment(local, first, heights, widths, splits=1)
        output = segment.output_bytes() if i + 1 < len(groups) else 0.0
        segment = _split(segment, room=memory - stored - output)
        segments.append(segment)
        peak = max(peak, stored + output + segment.bytes())
        stored = output
    return Plan(tuple(segments), peak)


def run(found: Plan, read: Read, write: Write) -> None:
    """Run a network in tiles: `read` gives parts of its input, `write` takes the tiles of its output."""
    for i, segment in enumerate(found.segments):
        if i + 1 == len(found.segments):
            _run_segment(segment, read, write)
            return
        output: list[Tensor] = []
        _run_segment(
            segment, read, lambda rows, columns, tile, output=output, segment=segment: _store(output, segment, rows, columns, tile)
        )
        read = _reader(output[0])


def _reader(stored: Tensor) -> Read:
    return lambda rows, columns: stored[..., rows.start : rows.stop, columns.start : columns.stop]


def _store(output: list[Tensor], segment: Segment, rows: Span, columns: Span, tile: Tensor) -> None:
    """Write a tile of a segment's output into a map, which is allocated at the first tile; a tile that is the whole map is kept itself."""
    if segment.splits == 1:
        output.append(tile)
        return
    if not output:
        output.append(tile.new_empty(1, tile.shape[1], segment.heights[-1], segment.widths[-1]))
    output[0][..., rows.start : rows.stop, columns.start : columns.stop] = tile


def _run_segment(segment: Segment, read: Read, write: Write) -> None:
    layers = segment.layers
    if segment.first is not None and segment.splits > 1:
        sums = _gather(segment, segment.first, read)
        apply = segment.first.apply
        layers = (replace(layers[0], run=lambda x: apply(x, sums)), *layers[1:])
    for rows, columns in segment.tiles():
        row_spans, column_spans = needed(layers, rows, segment.heights), needed(layers, columns, segment.widths)
        x = read(row_spans[0], column_spans[0])
        for i, layer in enumerate(layers):
            x = _crop(layer.run(x), _scaled(row_spans[i], layer), row_spans[i + 1], _scaled(column_spans[i], layer), column_spans[i + 1])
        write(rows, columns, x)


def _gather(segment: Segment, first: GlobalLayer, read: Read) -> Tensor:
    """The sums of a global layer over its whole input."""
    total: Tensor | None = None
    layer = segment.layers[:1]
    side = -(-max(segment.heights[0], segment.widths[0]) // segment.splits)
    for rows in _pieces(segment.heights[0], side):
        for columns in _pieces(segment.widths[0], side):
            row_span, column_span = (
                needed(layer, span, (size, size))[0] for span, size in ((rows, segment.heights[0]), (columns, segment.widths[0]))
            )
            sums = first.sums(_crop(first.features(read(row_span, column_span)), row_span, rows, column_span, columns))
            total = sums if total is None else total + sums
    assert total is not None
    return total


def _split(segment: Segment, *, room: float) -> Segment:
    """The segment in as few tiles as fit into `room` bytes, or in the smallest ones."""
    coarse = min(max(segment.heights[0], segment.widths[0]), max(segment.heights[-1], segment.widths[-1]))
    most = max(1, coarse // SMALLEST)
    low, high = 0, 1
    while high < most and replace(segment, splits=high).bytes() > room:
        low, high = high, min(most, high * 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if replace(segment, splits=middle).bytes() > room else (low, middle)
    return replace(segment, splits=high)


def _groups(layers: Sequence[Layer | GlobalLayer]) -> list[tuple[GlobalLayer | None, tuple[Layer, ...]]]:
    """The layers from each global one up to the next; those before the first one are a group without a global layer."""
    groups: list[tuple[GlobalLayer | None, list[Layer]]] = []
    for layer in layers:
        if not isinstance(layer, Layer):
            groups.append((layer, [Layer(layer.apply, layer.halo, layer.channels, layer.work)]))
        elif groups:
            groups[-1][1].append(layer)
        else:
            groups.append((None, [layer]))
    return [(first, tuple(local)) for first, local in groups]


def _sizes(layers: Sequence[Layer], size: int) -> tuple[int, ...]:
    sizes = [size]
    for layer in layers:
        sizes.append(sizes[-1] * layer.up // layer.down)
    return tuple(sizes)


def _pieces(size: int, side: int) -> list[Span]:
    return [Span(start, min(size, start + side)) for start in range(0, size, side)]


def _scaled(span: Span, layer: Layer) -> Span:
    return Span(span.start * layer.up // layer.down, span.stop * layer.up // layer.down)


def _crop(x: Tensor, rows: Span, row_part: Span, columns: Span, column_part: Span) -> Tensor:
    """The part of a map that lies at `rows` and `columns`, without keeping the rest in memory."""
    return x[..., row_part.within(rows), column_part.within(columns)].contiguous()
