"""Tables of an evaluation, for the screen and as Markdown: rows are metrics and bins, columns settings."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Sequence

from launch.evaluation.bins import ALL, ASPECT, SIZE
from launch.evaluation.results.rows import Row, title_of

ARROWS = {"lower": "↓", "higher": "↑"}
_SCREEN = 120  # characters, where there is no terminal
_GAP = 3  # characters between columns
_MOST_DECIMALS = 8
_SECTIONS = (("All images", ALL), ("By size", SIZE), ("By aspect ratio", ASPECT))  # title, start of the names of its bins


def column_titles(rows: Sequence[Row]) -> list[str]:
    """Titles of the settings, in order."""
    settings = list(dict.fromkeys((row.steps, row.guidance) for row in rows))
    with_guidance = len({guidance for _, guidance in settings}) > 1
    return [_setting(steps, guidance, with_guidance=with_guidance) for steps, guidance in settings]


def _setting(steps: int | None, guidance: float | None, *, with_guidance: bool) -> str:
    if steps is None:
        return "value"
    return f"{steps} step{'s' * (steps != 1)}" + (f", guidance {guidance:g}" if with_guidance else "")


def value_with_margin(value: float, low: float, high: float) -> str:
    """Such as "0.982 ± 0.012": the margin with two digits, the value with as many decimals."""
    margin = (high - low) / 2
    if not margin > 0 or not math.isfinite(margin):
        return f"{value:.4g} ± {margin:.2g}"
    decimals = min(max(1 - math.floor(math.log10(margin)), 0), _MOST_DECIMALS)
    return f"{value:.{decimals}f} ± {margin:.{decimals}f}"


def screen_table(rows: Sequence[Row], *, title: str, real: Sequence[Row] = (), bin: str = ALL, width: int | None = None) -> str:
    """A table of all images, for the screen; below one another in parts if it is wider. width: characters; None: of the terminal."""
    width = width or shutil.get_terminal_size((_SCREEN, 0)).columns
    columns, titles = _columns(rows, real), [*column_titles(rows), *_real_title(real)]
    cells = _lines([row for row in (*rows, *real) if row.bin == bin], columns=columns, with_bin=False)
    widths = [max(map(len, each)) + _GAP for each in zip(*([titles] + [line[1:] for line in cells]), strict=True)]
    name_width = min(max((len(line[0]) for line in cells), default=0), max(width - min(widths) - _GAP, width // 3), width // 2)
    parts = _parts(widths, width=width - name_width - _GAP)
    texts = [_screen_part(cells, titles=titles, part=part, name_width=name_width, width=width) for part in parts]
    return "\n\n".join([title, *texts])


def _parts(widths: Sequence[int], *, width: int) -> list[slice]:
    """Columns that fit beside one another, in parts of nearly equal size."""
    for number in range(1, len(widths) + 1):
        size = -(-len(widths) // number)
        parts = [slice(start, start + size) for start in range(0, len(widths), size)]
        if all(sum(widths[part]) <= width for part in parts):
            return parts
    return [slice(column, column + 1) for column in range(len(widths))]


def _screen_part(cells: Sequence[Sequence[str]], *, titles: Sequence[str], part: slice, name_width: int, width: int) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", max_width=name_width)
    for title in titles[part]:
        table.add_column(title, justify="right", no_wrap=True)
    for line in cells:
        table.add_row(line[0], *line[1:][part])
    output = io.StringIO()
    Console(file=output, width=width).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")


def markdown_tables(rows: Sequence[Row], *, real: Sequence[Row] = ()) -> str:
    """Tables of all images, by size and by aspect ratio."""
    columns, titles, parts = _columns(rows, real), [*column_titles(rows), *_real_title(real)], []
    for title, start in _SECTIONS:
        own = [row for row in (*rows, *real) if row.bin == start or row.bin.startswith(f"{start} ")]
        if not own:
            continue
        with_bin = start != ALL
        header = ["metric", *(["bin", "images"] if with_bin else []), *titles]
        lines = [header, ["---"] * len(header), *_lines(own, columns=columns, with_bin=with_bin)]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)


def _columns(rows: Sequence[Row], real: Sequence[Row]) -> list[tuple[int | None, float | None]]:
    return list(dict.fromkeys((row.steps, row.guidance) for row in (*rows, *real)))


def _real_title(real: Sequence[Row]) -> list[str]:
    """Title of the last column, if there is one."""
    return ["real"] if real else []


def _lines(rows: Sequence[Row], *, columns: Sequence[tuple[int | None, float | None]], with_bin: bool) -> list[list[str]]:
    """Cells of the lines: one for each metric and bin, the bins of a metric one after the other."""
    lines = []
    for measure in dict.fromkeys(row.measured for row in rows):
        of_measure = [row for row in rows if row.measured == measure]
        for bin in dict.fromkeys(row.bin for row in of_measure):
            cells = {(row.steps, row.guidance): row for row in of_measure if row.bin == bin}
            first = next(iter(cells.values()))
            title = f"{title_of(*measure)} {ARROWS[first.better]}"
            values = [value_with_margin(row.value, row.low, row.high) if (row := cells.get(column)) else "" for column in columns]
            lines.append([title, *([bin, str(first.images)] if with_bin else []), *values])
    return lines
