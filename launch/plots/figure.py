"""Draw curves of runs: a panel for each column, a colour for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.plots.curves import Axis, Curve, Points, smoothed
from pipeline.storage.atomic import publish

_LABELS: Mapping[Axis, str] = {"step": "step", "images": "images", "hours": "hours of training"}
_MARKERS = {"weights": "o", "EMA": "D"}


def draw(curves: Mapping[str, Sequence[Curve]], *, axis: Axis, out: Path) -> None:
    """Draw to a file, whose extension chooses the format. Raises ValueError for an unknown format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = out.suffix.lstrip(".").lower() or "png"
    figure = Figure(figsize=(9, 1 + 4 * len(curves)), dpi=150, layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"--out {out}: no such format; choose one of {', '.join(sorted(known))}")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (column, of_column) in zip(panels, curves.items(), strict=True):
        for number, curve in enumerate(of_column):
            _draw_curve(panel, curve, colour=f"C{number % 10}")
        panel.set_ylabel(column)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize="small")
    panels[-1].set_xlabel(_LABELS[axis])
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}" if axis == "hours" else f"{value:,.0f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with publish(out) as stream:
        figure.savefig(stream, format=kind)


def _draw_curve(panel: Any, curve: Curve, *, colour: str) -> None:
    """The raw curve faintly under the smoothed one; validation as points, restarts as vertical lines."""
    x, y = curve.points.x, curve.points.y
    if curve.is_validation:
        _draw_points(panel, curve.points, colour=colour, marker="o", label=curve.run)
    elif x:
        strong = smoothed(y)
        if strong != y:
            panel.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(x, strong, color=colour, linewidth=1.8, label=curve.run)
    for weights, points in curve.validation.items():
        label = f"{curve.run}, validation" + (" of the EMA" if weights == "EMA" else "")
        _draw_points(panel, points, colour=colour, marker=_MARKERS[weights], label=label)
    for number, restart in enumerate(curve.restarts):
        label = None if number else f"{curve.run}, restart" + ("s" if len(curve.restarts) > 1 else "")
        panel.axvline(restart, color=colour, linestyle=":", linewidth=1.2, alpha=0.8, label=label)


def _draw_points(panel: Any, points: Points, *, colour: str, marker: str, label: str) -> None:
    fill = "white" if marker == "D" else colour
    style = {"linestyle": "--", "linewidth": 0.8, "marker": marker, "markersize": 5, "markerfacecolor": fill}
    panel.plot(points.x, points.y, color=colour, label=label, **style)
