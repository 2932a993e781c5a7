"""`tim preview`: a time-lapse over a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import parse_sizes, parse_steps
from launch.command_options import Debug, Json
from launch.console import session


def preview(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run_dir of a training run.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A .webp or .gif file. Default: RUN/previews/time-lapse.webp.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Draw other prompts from the checkpoints; may be repeated.")
    ] = None,
    classes: Annotated[list[int] | None, typer.Option("--class", min=0, metavar="ID", help="The same for a class model.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH[,WxH]...", help="Draw other sizes from the checkpoints.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="N[,N]...", help="Draw other numbers of sampling steps.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how a run's images developed, as an animation.

    A frame for each preview that was drawn while training, and for each checkpoint without one, drawn from its averaged weights.

    Example: tim preview runs/first --out first.gif
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.previews.time_lapse import time_lapse

        if prompt and classes:
            raise ValueError("expected --prompt TEXT, or --class ID for a class model: both were given")
        changes: dict[str, object] = {}
        if prompt or classes:
            changes["prompts"] = tuple(prompt or classes or ())
        if size is not None:
            changes["sizes"] = tuple(f"{width}x{height}" for height, width in parse_sizes(size))
        if steps is not None:
            changes["steps"] = tuple(parse_steps(steps))
        done = time_lapse(run, out=out, changes=changes, console=console)
        drawn = f", {len(done.drawn)} of them drawn from checkpoints" if done.drawn else ""
        text = f"{done.path}: {len(done.steps)} frame{'s' * (len(done.steps) > 1)}{drawn}"
        console.result(text, data={"file": done.path, "steps": done.steps, "drawn": done.drawn})
