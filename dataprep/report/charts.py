"""Counts as images: histograms that grow with their data, drawn as small inline SVG that any browser shows without a network.

Colours are CSS variables of the page (`--a` and `--b` for the first and second corpus), so that a chart follows light and dark.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

MAX_BINS = 48
_FINEST = -60  # bins are never narrower than 2 to this
_FINEST_BITS = 64  # nor than the largest number divided by 2 to this, which is beyond what floats can tell apart
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 200, 56, 24, 12, 38
_MAX_TICKS = 8
_SERIES = ("a", "b")

Label = Callable[[float], str]


class Histogram:
    """Counts of numbers in bins whose width is a power of two: the least of which at most 48 bins hold all numbers.

    Which numbers came first makes no difference. `finest`: the width is at least 2 to this.
    """

    def __init__(self, *, finest: int = _FINEST) -> None:
        self.power = finest
        self.counts: Counter[int] = Counter()
        self._least, self._greatest = math.inf, -math.inf

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Count the finite ones of (n,) numbers."""
        finite = numbers[np.isfinite(numbers)]
        if not len(finite):
            return
        self._least, self._greatest = min(self._least, float(finite.min())), max(self._greatest, float(finite.max()))
        largest = max(abs(self._least), abs(self._greatest))
        power = max(self.power, math.frexp(largest)[1] - _FINEST_BITS)
        while math.floor(self._greatest / 2.0**power) - math.floor(self._least / 2.0**power) >= MAX_BINS:
            power += 1
        self.widen(power)
        bins, counts = np.unique(np.floor(finite / 2.0**power), return_counts=True)
        self.counts.update({int(place): int(count) for place, count in zip(bins, counts, strict=True)})

    def widen(self, power: int) -> None:
        """Merge bins until they are 2 to the `power` wide."""
        by = power - self.power
        if by > 0:
            merged: Counter[int] = Counter()
            for place, count in self.counts.items():
                merged[place >> by] += count
            self.counts, self.power = merged, power

    @property
    def total(self) -> int:
        return self.counts.total()


def histogram(title: str, series: Mapping[str, Histogram], *, label: Label, is_log: bool = False, is_whole: bool = False) -> str:
    """Bars of one or two corpora by name, in shares of each if there are two. `label` writes a number of the axis.

    `is_log`: the numbers are logarithms to base 2, and ticks stand at whole ones. `is_whole`: there are none between whole numbers.
    """
    drawn = {name: each for name, each in series.items() if each.total}
    if not drawn:
        return ""
    power = max(each.power for each in drawn.values())
    for each in drawn.values():
        each.widen(power)
    first, last = (pick(place for each in drawn.values() for place in each.counts) for pick in (min, max))
    while last - first >= 2 * MAX_BINS:  # the two corpora lie far apart
        power += 1
        for each in drawn.values():
            each.widen(power)
        first, last = first >> 1, last >> 1
    width = 2.0**power
    as_share = len(series) > 1
    heights: dict[str, dict[int, float]] = {}
    for name, each in drawn.items():
        whole = each.total if as_share else 1
        heights[name] = {place: count / whole for place, count in each.counts.items()}
    tallest = max(height for bars in heights.values() for height in bars.values())
    step = (_WIDTH - _LEFT - _RIGHT) / (last - first + 1)
    bottom, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def say(height: float) -> str:
        return f"{height:.1%}" if as_share else f"{height:,.0f}"

    def span(place: int) -> str:
        low, high = place * width, (place + 1) * width - is_whole
        return label(low) if low == high else f"{label(low)} to {label(high)}"

    shares = (1.0, 0.5) if as_share or tallest >= 2 else (1.0,)
    parts = [_gridline(bottom - room * share, say(tallest * share) if as_share else _short(tallest * share)) for share in shares]
    slim = (step - 1) / len(series)  # bars of two corpora stand side by side
    for at, (colour, name) in enumerate(zip(_SERIES, series, strict=False)):
        for place, height in sorted(heights.get(name, {}).items()):
            tall = max(room * height / tallest, 1.0)
            told = f"{name}: " * as_share + f"{span(place)}: {say(height)}"
            parts.append(
                f'<rect class="{colour}" x="{_LEFT + (place - first) * step + at * slim:.2f}" y="{bottom - tall:.2f}" '
                f'width="{slim:.2f}" height="{tall:.2f}"><title>{escape(told)}</title></rect>'
            )
    low, high = first * width, (last + 1) * width
    one = is_whole and width == 1  # number a bar, which stands in its middle
    ticks = _whole_ticks(low, high - one) if is_log or is_whole else _round_ticks(low, high)
    parts += [_tick(_LEFT + (tick / width - first + one / 2) * step, label(tick)) for tick in ticks]
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{_WIDTH - _RIGHT}"/>')
    rows = [
        (span(place), *(say(heights.get(name, {}).get(place, 0)) for name in series))
        for place in range(first, last + 1)
        if any(place in bars for bars in heights.values())
    ]
    return _figure(title, "".join(parts), height=_HEIGHT, header=("from … to", *series), rows=rows)


def sizes(title: str, counts: Mapping[tuple[int, int], int]) -> str:
    """Widths against heights, in half octaves: `counts` by (⌊2·log2 width⌋, ⌊2·log2 height⌋). The darker, the more."""
    if not counts:
        return ""
    columns, rows = ([pick(cell[axis] for cell in counts) for pick in (min, max)] for axis in (0, 1))
    cell = min(26.0, (_WIDTH - _LEFT - _RIGHT) / (columns[1] - columns[0] + 1))
    tall = cell * (rows[1] - rows[0] + 1)
    height = math.ceil(_TOP + tall + _BOTTOM)
    most = max(counts.values())
    parts = []
    for (column, row), count in sorted(counts.items()):
        told = f"{_octave(column)} to {_octave(column + 1)} px wide, {_octave(row)} to {_octave(row + 1)} px high: {count:,}"
        x, y = _LEFT + (column - columns[0]) * cell, _TOP + (rows[1] - row) * cell
        parts.append(
            f'<rect class="a" x="{x:.2f}" y="{y:.2f}" width="{cell - 1:.2f}" height="{cell - 1:.2f}" '
            f'fill-opacity="{0.12 + 0.88 * math.sqrt(count / most):.3f}"><title>{told}</title></rect>'
        )
    across, down = (range(low + low % 2, high + 2, 2) for low, high in (columns, rows))  # whole octaves
    parts += [_tick(_LEFT + (column - columns[0]) * cell, _octave(column), bottom=_TOP + tall) for column in across]
    parts += [_end_text(_TOP + (rows[1] + 1 - row) * cell, _octave(row)) for row in down]
    table = [
        (f"{_octave(column)} to {_octave(column + 1)}", f"{_octave(row)} to {_octave(row + 1)}", f"{count:,}")
        for (column, row), count in sorted(counts.items())
    ]
    return _figure(title, "".join(parts), height=height, header=("width, px", "height, px", "pictures"), rows=table)


def data_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts, the first column of which heads its row; without a head if the header is empty."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    head = f"<thead><tr>{head}</tr></thead>" * any(header)
    cells = ((escape(row[0]), "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])) for row in rows)
    lines = "".join(f'<tr><th scope="row">{first}</th>{others}</tr>' for first, others in cells)
    return f"<table>{head}<tbody>{lines}</tbody></table>"


def _figure(title: str, inside: str, *, height: int, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The drawing, and its numbers for those who cannot see it."""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg role="img" aria-label="{escape(title)}: the numbers follow as a table" viewBox="0 0 {_WIDTH} {height}">{inside}</svg>'
        f"<details><summary>numbers</summary>{data_table(header, rows)}</details></figure>"
    )


def _gridline(y: float, text: str) -> str:
    return f'<path class="grid" d="M{_LEFT} {y:.2f}H{_WIDTH - _RIGHT}"/>{_end_text(y, text)}'


def _end_text(y: float, text: str) -> str:
    """Left of the axis, in the middle of `y`."""
    return f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.2f}">{escape(text)}</text>'


def _tick(x: float, text: str, *, bottom: float = _HEIGHT - _BOTTOM) -> str:
    return f'<path class="axis" d="M{x:.2f} {bottom:.2f}v5"/><text class="middle" x="{x:.2f}" y="{bottom + 20:.2f}">{escape(text)}</text>'


def _short(count: float) -> str:
    """What has room beside the axis: "12.3 k" for 12,345."""
    power = min(3, int(math.log10(max(count, 1)) // 3))
    return f"{count:,.0f}" if count < 10_000 else f"{count / 1000**power:.4g} {' kMG'[power]}"


def _octave(half: int) -> str:
    return f"{2 ** (half / 2):.0f}"


def _whole_ticks(low: float, high: float) -> list[float]:
    step = max(1, math.ceil((high - low) / _MAX_TICKS))
    return [float(tick) for tick in range(math.ceil(low), math.floor(high) + 1) if tick % step == 0]


def _round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / _MAX_TICKS
    if not (math.isfinite(raw) and raw > 0):
        return [low]
    decade = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * decade for factor in (1, 2, 5, 10) if factor * decade >= raw), 10 * decade)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
