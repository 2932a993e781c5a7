"""`tim launch`: training with several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.arguments import one_config
from launch.commands.options import ConfigArgument, Debug, Json, Replan
from launch.console import STOPPED, Console, session


def launch(
    config: ConfigArgument,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Number of training processes on this machine: one per GPU.")],
    nnodes: Annotated[int, typer.Option(min=1, help="Number of machines; run the command on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Index of this machine, from 0.")] = 0,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of machine 0.")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to start all processes again from the newest checkpoint after one died or hung.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command without running it.")] = False,
    replan: Replan = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train with several processes.

    The processes run under torchrun and never outlive this command. Resumes an existing run in run_dir, also with a different number of
    processes: samples and random draws of each step stay the same. Names the process that died or hung, and what it was doing.

    Example: tim launch photos --nproc-per-node 2 corpus=corpus run_dir=runs/first
    """
    with session(as_json=as_json, debug=debug) as console:
        from launch.config.load import load_config
        from launch.distributed import torchrun
        from launch.training.planning import check_ready

        source, overrides = one_config(config)
        settings = load_config(source, overrides=overrides)
        run_dir = check_ready(settings)
        layout: dict[str, Any] = {
            "overrides": overrides,
            "nproc_per_node": nproc_per_node,
            "nnodes": nnodes,
            "node_rank": node_rank,
            "rdzv_endpoint": rdzv_endpoint,
            "options": [*["--debug"] * debug, *["--replan"] * replan],
            "max_restarts": max_restarts,
        }
        if dry_run:
            line = torchrun.command_line(torchrun.torchrun_arguments(source, **layout), nproc_per_node=nproc_per_node)
            console.result(line, data={"command": line})
            return
        code = torchrun.launch(source, **layout, run_dir=run_dir, hang_limits=settings.train.hang_limits)
        if code == 0:
            print_result(console, run_dir, steps=settings.train.steps)
        elif code == STOPPED:
            console.result(f"{run_dir}: stopped by a signal, checkpoint saved", data={"run": run_dir, "exit": code})
        else:
            console.failure(f"training ended with exit code {code}: see the lines above", code=code)
        raise SystemExit(code)


def print_result(console: Console, run_dir: Path, *, steps: int) -> None:
    from launch.training.metrics import read_rows

    model = run_dir / "model"
    rows = read_rows(run_dir / "metrics.jsonl")
    data = {"run": run_dir, "model": model, "steps": steps, "last": rows[-1] if rows else None}
    console.result(f"{model}: trained for {steps} steps", data=data)
