"""Command for curves of runs: `tim plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.command_options import Debug, Json
from launch.console import session


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The run_dir of training runs.")],
    x: Annotated[Literal["step", "images", "hours"], typer.Option("--x", help="What to plot against; hours are of training.")] = "step",
    what: Annotated[
        str, typer.Option(metavar="COLUMN[,COLUMN]...", help="Columns of metrics.jsonl, one panel each; eval: all of evaluations.")
    ] = "loss",
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; its extension chooses the format.")] = Path("plot.png"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Plot metrics of one or more runs.

    Smoothed curves over the raw ones, the loss on held-out images as points, and restarts as dotted lines.

    Example: tim plot runs/first runs/second --x hours --what loss,grad_norm --out loss.png
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.plots.curves import read_curves
        from launch.plots.figure import draw

        columns = list(dict.fromkeys(name.strip() for name in what.split(",")))
        curves = read_curves(runs, columns=columns, axis=x)
        draw(curves, axis=x, out=out)
        data = [curve.to_json() for of_column in curves.values() for curve in of_column]
        console.result(str(out), data={"out": out, "x": x, "what": columns, "curves": data})
