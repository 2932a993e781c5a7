"""Histograms whose bins widen with their data, and charts as inline SVG, which a browser shows without a network.

Colours are CSS variables of the page (`--a` and `--b` for the first and second corpus), so that a chart follows light and dark mode.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataprep.report.templates import render_template

MAX_BINS = 48
_FINEST = -60  # log2 of the smallest bin width
_FINEST_BITS = 64  # a bin is at least the largest number / 2^64 wide, which is below the resolution of floats
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 200, 56, 24, 12, 38
_MAX_TICKS = 8
_SERIES = ("a", "b")

Label = Callable[[float], str]


class Histogram:
    """Counts of numbers in bins whose width is a power of two: the smallest one with which 48 bins hold all numbers.

    The result does not depend on the order of the numbers. `finest`: log2 of the smallest bin width.
    """

    def __init__(self, *, finest: int = _FINEST) -> None:
        self.power = finest
        self.counts: Counter[int] = Counter()
        self._least, self._greatest = math.inf, -math.inf

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Count the finite values of (n,) numbers."""
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
        self.counts.update({int(number): int(count) for number, count in zip(bins, counts, strict=True)})

    def widen(self, power: int) -> None:
        """Merge bins until they are 2^power wide."""
        by = power - self.power
        if by > 0:
            merged: Counter[int] = Counter()
            for number, count in self.counts.items():
                merged[number >> by] += count
            self.counts, self.power = merged, power

    @property
    def total(self) -> int:
        return self.counts.total()


@dataclass(frozen=True, slots=True)
class _Bar:
    series: str
    x: float
    y: float
    width: float
    height: float
    title: str
    opacity: float | None = None


@dataclass(frozen=True, slots=True)
class _Chart:
    """What `chart.html.jinja` draws, in pixels. `table` holds the numbers for readers who cannot see the drawing."""

    title: str
    bars: Sequence[_Bar]
    y_labels: Sequence[tuple[float, str]]
    x_labels: Sequence[tuple[float, str]]
    header: Sequence[str]
    table: Sequence[Sequence[str]]
    gridlines: Sequence[float] = ()
    bottom: float = _HEIGHT - _BOTTOM
    height: int = _HEIGHT
    has_axis: bool = False
    width: int = _WIDTH
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT


def histogram(title: str, series: Mapping[str, Histogram], *, label: Label, is_log: bool = False, is_whole: bool = False) -> str:
    """Bars of one or two corpora by name, as shares of each if there are two; "" without numbers. `label` formats a number of the axis.

    `is_log`: the numbers are logarithms to base 2, with ticks at whole ones. `is_whole`: all numbers are whole.
    """
    drawn = {name: each for name, each in series.items() if each.total}
    if not drawn:
        return ""
    first, last, width = _common_bins(list(drawn.values()))
    as_share = len(series) > 1
    heights: dict[str, dict[int, float]] = {}
    for name, each in drawn.items():
        whole = each.total if as_share else 1
        heights[name] = {number: count / whole for number, count in each.counts.items()}
    tallest = max(height for bars in heights.values() for height in bars.values())
    step = (_WIDTH - _LEFT - _RIGHT) / (last - first + 1)
    bottom, room = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def format_height(height: float) -> str:
        return f"{height:.1%}" if as_share else f"{height:,.0f}"

    def format_bin(number: int) -> str:
        low, high = number * width, (number + 1) * width - is_whole
        return label(low) if low == high else f"{label(low)} to {label(high)}"

    bar_width = (step - 1) / len(series)  # bars of two corpora stand side by side
    bars: list[_Bar] = []
    for position, (colour, name) in enumerate(zip(_SERIES, series, strict=False)):
        for number, height in sorted(heights.get(name, {}).items()):
            pixels = max(room * height / tallest, 1.0)
            hint = f"{name}: " * as_share + f"{format_bin(number)}: {format_height(height)}"
            x = _LEFT + (number - first) * step + position * bar_width
            bars.append(_Bar(colour, x, bottom - pixels, bar_width, pixels, hint))
    low, high = first * width, (last + 1) * width
    centring = is_whole and width == 1  # one number per bar: the tick is below the middle of the bar
    ticks = _whole_ticks(low, high - centring) if is_log or is_whole else _round_ticks(low, high)
    shares = (1.0, 0.5) if as_share or tallest >= 2 else (1.0,)
    lines = [bottom - room * share for share in shares]
    texts = [format_height(tallest * share) if as_share else _short(tallest * share) for share in shares]
    chart = _Chart(
        title=title,
        bars=bars,
        gridlines=lines,
        y_labels=list(zip(lines, texts, strict=True)),
        x_labels=[(_LEFT + (tick / width - first + centring / 2) * step, label(tick)) for tick in ticks],
        has_axis=True,
        header=("from … to", *series),
        table=[
            (format_bin(number), *(format_height(heights.get(name, {}).get(number, 0)) for name in series))
            for number in range(first, last + 1)
            if any(number in bars for bars in heights.values())
        ],
    )
    return render_template("chart.html.jinja", chart=chart)


def _common_bins(histograms: Sequence[Histogram]) -> tuple[int, int, float]:
    """Widen the histograms to one bin width with at most 96 bins in all. Returns the first bin, the last bin and the width."""
    power = max(each.power for each in histograms)
    while True:
        for each in histograms:
            each.widen(power)
        first, last = (pick(number for each in histograms for number in each.counts) for pick in (min, max))
        if last - first < 2 * MAX_BINS:
            return first, last, 2.0**power
        power += 1


def sizes(title: str, counts: Mapping[tuple[int, int], int]) -> str:
    """Widths against heights, in half octaves: `counts` by (⌊2·log2 width⌋, ⌊2·log2 height⌋). Darker cells hold more images."""
    if not counts:
        return ""
    columns, rows = ([pick(cell[axis] for cell in counts) for pick in (min, max)] for axis in (0, 1))
    cell = min(26.0, (_WIDTH - _LEFT - _RIGHT) / (columns[1] - columns[0] + 1))
    tall = cell * (rows[1] - rows[0] + 1)
    most = max(counts.values())
    bars: list[_Bar] = []
    for (column, row), count in sorted(counts.items()):
        hint = f"{_octave(column)} to {_octave(column + 1)} px wide, {_octave(row)} to {_octave(row + 1)} px high: {count:,}"
        x, y = _LEFT + (column - columns[0]) * cell, _TOP + (rows[1] - row) * cell
        bars.append(_Bar("a", x, y, cell - 1, cell - 1, hint, opacity=0.12 + 0.88 * math.sqrt(count / most)))
    across, down = (range(low + low % 2, high + 2, 2) for low, high in (columns, rows))  # whole octaves
    chart = _Chart(
        title=title,
        bars=bars,
        x_labels=[(_LEFT + (column - columns[0]) * cell, _octave(column)) for column in across],
        y_labels=[(_TOP + (rows[1] + 1 - row) * cell, _octave(row)) for row in down],
        bottom=_TOP + tall,
        height=math.ceil(_TOP + tall + _BOTTOM),
        header=("width, px", "height, px", "images"),
        table=[
            (f"{_octave(column)} to {_octave(column + 1)}", f"{_octave(row)} to {_octave(row + 1)}", f"{count:,}")
            for (column, row), count in sorted(counts.items())
        ],
    )
    return render_template("chart.html.jinja", chart=chart)


def _short(count: float) -> str:
    """A count short enough for the axis: "12.3 k" for 12,345."""
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
