"""Tables of an evaluation, for the screen and as Markdown: rows are metrics and bins, columns settings."""

from __future__ import annotations

import io
from collections.abc import Sequence

from launch.evaluation.bins import ALL, ASPECT, SIZE
from launch.evaluation.results.rows import Row, title_of

_ARROWS = {"lower": "↓", "higher": "↑"}
_SCREEN = 150  # characters
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
    """Such as "0.98 ± 0.02"."""
    return f"{value:.4g} ± {(high - low) / 2:.2g}"


def screen_table(rows: Sequence[Row], *, title: str, bin: str = ALL) -> str:
    """A table of all images, for the screen."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    for column in column_titles(rows):
        table.add_column(column, justify="right")
    for cells in _lines([row for row in rows if row.bin == bin], columns=_columns(rows), with_bin=False):
        table.add_row(*cells)
    output = io.StringIO()
    Console(file=output, width=_SCREEN).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")


def markdown_tables(rows: Sequence[Row]) -> str:
    """Tables of all images, by size and by aspect ratio."""
    columns, titles, parts = _columns(rows), column_titles(rows), []
    for title, start in _SECTIONS:
        own = [row for row in rows if row.bin == start or row.bin.startswith(f"{start} ")]
        if not own:
            continue
        with_bin = start != ALL
        header = ["metric", *(["bin", "images"] if with_bin else []), *titles]
        lines = [header, ["---"] * len(header), *_lines(own, columns=columns, with_bin=with_bin)]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)


def _columns(rows: Sequence[Row]) -> list[tuple[int | None, float | None]]:
    return list(dict.fromkeys((row.steps, row.guidance) for row in rows))


def _lines(rows: Sequence[Row], *, columns: Sequence[tuple[int | None, float | None]], with_bin: bool) -> list[list[str]]:
    """Cells of the lines: one for each metric and bin, the bins of a metric one after the other."""
    lines = []
    for measure in dict.fromkeys(row.measured for row in rows):
        of_measure = [row for row in rows if row.measured == measure]
        for bin in dict.fromkeys(row.bin for row in of_measure):
            cells = {(row.steps, row.guidance): row for row in of_measure if row.bin == bin}
            first = next(iter(cells.values()))
            title = f"{title_of(*measure)} {_ARROWS[first.better]}"
            values = [value_with_margin(row.value, row.low, row.high) if (row := cells.get(column)) else "" for column in columns]
            lines.append([title, *([bin, str(first.images)] if with_bin else []), *values])
    return lines
