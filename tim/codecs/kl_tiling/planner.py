"""How an autoencoder's steps run under a memory limit: passes over the image, tile sizes, and what is kept between passes.

A pass starts from values kept by an earlier one and runs up to a position (the input of a step). A pass over tiles stops at the next group
norm, whose statistics it collects; a pass over the whole image needs no stop. One tensor is kept at a time, at positions outside residual
blocks. The plan is the cheapest sequence of passes within the limit: a shortest path (Dijkstra) through what is kept and which statistics
are known.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import mul
from typing import NamedTuple

from tim.codecs.base import Span
from tim.codecs.kl_tiling.regions import Shape, split
from tim.codecs.kl_tiling.steps import ELEMENT_WORK, Add, Attend, Conv, Double, Norm, Save, Step

FLOAT = 4  # bytes
OVERHEAD = 96 * 10**6  # bytes: reordered weights, buffers of statistics, the allocator's own; 60 measured on the CPU
SMALLEST_TILE = 16  # pixels: smaller ones would be little but halo
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tiles along the longer side that are tried


class Pass(NamedTuple):
    """Steps `start` to `stop` in tiles of at most `side` × `side` values at `stop`, or on the whole image if `side` is None.

    `keep`: the position whose values the next passes start from; None: those of before.
    """

    start: int
    stop: int
    side: int | None
    keep: int | None


class Plan(NamedTuple):
    """Passes for an input, and what they cost. `shapes[i]` is that of the input of step i; the last is the output's.

    peak: predicted memory in bytes beside weights, input and output. work, whole_work: floating-point operations of the plan, and of the
    network on the whole image.
    """

    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]
    passes: tuple[Pass, ...]
    peak: int
    work: int
    whole_work: int


class _Option(NamedTuple):
    """A pass that could come next, its work and peak memory, and what is known after it: kept position and number of stops passed."""

    next: Pass
    work: int
    peak: int
    known: tuple[int, int]


def plan(steps: Sequence[Step], shape: Shape, *, memory: float) -> Plan:
    """The cheapest plan for an input of this shape within `memory` bytes.

    If there is none, a plan with nearly the least memory: its `peak` is above `memory`.
    """
    program = _Program(tuple(steps), shape)
    found = program.cheapest(memory)
    return program.smallest() if found is None else found


def needed(steps: Sequence[Step], shapes: Sequence[Shape], start: int, stop: int, span: Span, *, axis: int) -> list[Span]:
    """Rows (axis 1) or columns (axis 2) needed at each position from `start` to `stop` for `span` at `stop`."""
    spans = [span]
    for i in range(stop - 1, start - 1, -1):
        spans.append(steps[i].reads(spans[-1], shapes[i][axis]))
    return spans[::-1]


def halo(plan: Plan) -> int:
    """Most rows or columns of a pass's input, on one side, that a tile needs beyond those under its output."""
    most = 0
    for each in plan.passes:
        for axis in (1, 2) if each.side is not None else ():
            side, end = plan.shapes[each.start][axis], plan.shapes[each.stop][axis]
            for span in split(end, each.side or end):
                first = needed(plan.steps, plan.shapes, each.start, each.stop, span, axis=axis)[0]
                most = max(most, span.start * side // end - first.start, first.stop - -(-span.stop * side // end))
    return most


@dataclass(frozen=True)
class _Program:
    """Steps with the shapes of their values for one input."""

    steps: tuple[Step, ...]
    shape: Shape
    _tiles: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        shapes = [self.shape]
        for step in self.steps:
            shapes.append(step.after(shapes[-1]))
        return tuple(shapes)

    @cached_property
    def areas(self) -> list[int]:
        """Pixels at each position."""
        return [shape.height * shape.width for shape in self.shapes]

    @cached_property
    def rates(self) -> list[int]:
        """Work per output pixel of each step; of steps in tiles, which excludes attention."""
        return [step.work(shape.channels, 1) for step, shape in zip(self.steps, self.shapes[1:], strict=True)]

    @cached_property
    def restarts(self) -> list[int]:
        """Positions whose values can be kept: outside residual blocks, before a block or a step that changes the size."""
        positions, depth = [], 0
        for i, step in enumerate(self.steps):
            is_start = isinstance(step, (Save, Double, Attend, Norm)) or (isinstance(step, Conv) and step.stride == 2)
            if depth == 0 and is_start:
                positions.append(i)
            depth += isinstance(step, Save) - isinstance(step, Add)
        return positions

    @cached_property
    def stops(self) -> list[int]:
        """Positions where passes over tiles must stop."""
        return [i for i, step in enumerate(self.steps) if isinstance(step, (Norm, Attend))]

    def cheapest(self, memory: float) -> Plan | None:
        """The cheapest plan within `memory` bytes, or None."""
        heap: list[tuple[int, int, tuple[int, int], int, tuple[Pass, ...]]] = [(0, 0, (0, 0), 0, ())]  # work, count, known, peak, passes
        done: set[tuple[int, int]] = set()
        while heap:
            work, count, known, peak, passes = heapq.heappop(heap)
            if known[0] == len(self.steps):
                return Plan(self.steps, self.shapes, passes, peak, work, self._whole_work(0, len(self.steps)))
            if known in done:
                continue
            done.add(known)
            for option in (*self._whole_passes(known[0], memory), *self._tile_passes(*known, memory)):
                heapq.heappush(heap, (work + option.work, count + 1, option.known, max(peak, option.peak), (*passes, option.next)))
        return None

    def smallest(self) -> Plan:
        """A plan with the least memory, to 5 %."""
        high = max(1.0, OVERHEAD)
        while (found := self.cheapest(high)) is None:
            high *= 2
        low = high / 2
        for _ in range(4):
            middle = (low * high) ** 0.5
            smaller = self.cheapest(middle)
            low, high, found = (middle, high, found) if smaller is None else (low, middle, smaller)
        return found

    def _whole_passes(self, kept: int, memory: float) -> Iterator[_Option]:
        """Passes over the whole image from `kept`."""
        lives = self._lives(kept, len(self.steps), self.areas[kept:])
        for stop in (*(i for i in self.restarts if i > kept), len(self.steps)):
            peak = lives[stop - kept] * FLOAT + OVERHEAD
            if peak > memory:
                return
            passed = sum(i < stop or (i == stop and self._attends(i)) for i in self.stops)
            yield _Option(Pass(kept, stop, None, stop), self._whole_work(kept, stop), peak, (stop, passed))

    def _tile_passes(self, kept: int, passed: int, memory: float) -> Iterator[_Option]:
        """Passes over tiles from `kept` to the next stop or the end."""
        stop = (*self.stops, len(self.steps))[passed]
        if any(self._attends(i) for i in range(kept, stop)):
            return
        previous = self.stops[passed - 1] if passed else 0
        keeps = [None, *(i for i in self.restarts if max(kept, previous) < i <= stop)] if stop < len(self.steps) else [None]
        for keep in keeps:
            position = kept if keep is None else keep
            if self._attends(stop) and position != stop:
                continue
            stored = OVERHEAD + FLOAT * sum(self.shapes[i].elements for i in {kept, position} if i > 0)
            tile = self._largest_tile(kept, stop, memory - stored)
            if tile is not None:
                side, work, peak = tile
                known = (stop, passed) if stop == len(self.steps) else (position, passed + 1)
                yield _Option(Pass(kept, stop, side, keep), work, peak + stored, known)

    def _attends(self, position: int) -> bool:
        return position < len(self.steps) and isinstance(self.steps[position], Attend)

    def _largest_tile(self, start: int, stop: int, memory: float) -> tuple[int, int, int] | None:
        """Side of the largest tile within `memory` bytes, with the work of all tiles and the bytes of one; None if there is none."""
        longest = max(self.shapes[stop].height, self.shapes[stop].width)
        for count in COUNTS:
            side = -(-longest // count)
            if count > 1 and side < SMALLEST_TILE:
                return None
            work, peak = self._tile(start, stop, side)
            if peak <= memory:
                return side, work, peak
        return None

    def _tile(self, start: int, stop: int, side: int) -> tuple[int, int]:
        """Work of a pass over tiles with this side, and the bytes of one. A tile in the middle of the image stands for all."""
        key = (start, stop, side)
        if key not in self._tiles:
            end = self.shapes[stop]
            rows, columns = split(end.height, side), split(end.width, side)
            middle = [(rows[len(rows) // 2], 1), (columns[len(columns) // 2], 2)]
            lengths = [[each.length for each in needed(self.steps, self.shapes, start, stop, span, axis=axis)] for span, axis in middle]
            areas = [height * width for height, width in zip(*lengths, strict=True)]
            work = sum(map(mul, self.rates[start:stop], areas[1:])) * len(rows) * len(columns)
            self._tiles[key] = work + end.elements * ELEMENT_WORK, self._lives(start, stop, areas)[-1] * FLOAT
        return self._tiles[key]

    def _lives(self, start: int, stop: int, areas: Sequence[int]) -> list[int]:
        """Most values in memory at once up to each position from `start` to `stop`. `areas`: pixels at these positions."""
        saved: list[int] = []
        now = most = self.shapes[start].channels * areas[0]
        is_shared = False  # whether the current tensor is the last one in `saved`
        lives = [most]
        for i in range(start, stop):
            step, before, after = self.steps[i], areas[i - start], areas[i - start + 1]
            result, extra = step.holds(self.shapes[i].channels, before, after)
            most = max(most, sum(saved) + (0 if is_shared else now) + result + extra)
            if isinstance(step, Save):
                saved.append(now)
            elif isinstance(step, Add):
                saved.pop()
            is_shared = isinstance(step, Save)
            now = result or now
            lives.append(most)
        return lives

    def _whole_work(self, start: int, stop: int) -> int:
        whole = zip(self.steps[start:stop], self.shapes[start + 1 : stop + 1], strict=True)
        return sum(step.work(shape.channels, shape.height * shape.width) for step, shape in whole)
