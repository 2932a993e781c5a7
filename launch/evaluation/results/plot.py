"""Plot of an evaluation: each metric by the number of steps with intervals, of all images, by size and by aspect ratio.

Dotted lines are the numbers of real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.evaluation.bins import ALL, ASPECT, SIZE
from launch.evaluation.results.rows import Row, better_of, title_of
from launch.evaluation.results.tables import ARROWS
from pipeline.storage.atomic import publish

_COLUMNS = (("all images", ALL), ("by size", SIZE), ("by aspect ratio", ASPECT))
_LINES = ("-", "--", ":", "-.")  # of guidance scales


def plot(rows: Sequence[Row], *, real: Sequence[Row] = (), out: Path) -> None:
    """Draw a row of panels for each metric, as PNG. Raises OSError if the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = list(dict.fromkeys(row.measured for row in rows))
    columns = [(title, start) for title, start in _COLUMNS if any(_belongs(row, start) for row in rows)]
    figure = Figure(figsize=(1 + 4.2 * len(columns), 0.6 + 2.6 * len(measures)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measures), len(columns), squeeze=False, sharex=True, sharey="row")
    for line, measure in zip(panels, measures, strict=True):
        for panel, (title, start) in zip(line, columns, strict=True):
            own, reference = ([row for row in each if row.measured == measure and _belongs(row, start)] for each in (rows, real))
            _draw_panel(panel, own, real={row.bin: row.value for row in reference}, is_all=start == ALL)
            panel.set_title(title if measure == measures[0] else "", fontsize="medium")
        line[0].set_ylabel(f"{title_of(*measure)} {ARROWS[better_of(measure[0])]}".replace(" (", "\n("))
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    with publish(out) as stream:
        figure.savefig(stream, format="png")


def _belongs(row: Row, start: str) -> bool:
    return row.bin == start or row.bin.startswith(f"{start} ")


def _draw_panel(panel: Any, rows: Sequence[Row], *, real: Mapping[str, float], is_all: bool) -> None:
    """A colour for each bin, a style of line for each guidance scale. real: values of real images by bin."""
    bins = list(dict.fromkeys(row.bin for row in rows))
    guidances = list(dict.fromkeys(row.guidance for row in rows))
    for colour, bin in enumerate(bins):
        for style, guidance in enumerate(guidances):
            points = sorted((row for row in rows if (row.bin, row.guidance) == (bin, guidance)), key=lambda row: row.steps or 0)
            names = [*([] if is_all else [bin.partition(" ")[2]]), *([f"guidance {guidance:g}"] if len(guidances) > 1 else [])]
            steps, values = [row.steps for row in points], [row.value for row in points]
            panel.fill_between(
                steps, [row.low for row in points], [row.high for row in points], color=f"C{colour}", alpha=0.15, linewidth=0
            )
            panel.plot(steps, values, _LINES[style % len(_LINES)], color=f"C{colour}", marker="o", markersize=3, label=", ".join(names))
        if bin in real:
            label = f"{'other ' * bool(rows[0].features)}real images" if is_all else None
            panel.axhline(real[bin], color="0.4" if is_all else f"C{colour}", linestyle=":", linewidth=1, label=label)
    shown = sorted({row.steps for row in rows if row.steps is not None})
    panel.set_xscale("log")
    panel.set_xticks(shown, [str(steps) for steps in shown])
    panel.minorticks_off()
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if any(panel.get_legend_handles_labels()[1]):
        panel.legend(frameon=False, fontsize="x-small")
