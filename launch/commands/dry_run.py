"""`tim train --dry-run`: check a run without a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launch.console import Console

if TYPE_CHECKING:
    from launch.config.schema import Config

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check config, plan, shards, weights, models and memory; take no step and write nothing. Exit code 2 if something is wrong.",
    ),
]
DryRunRanks = Annotated[int, typer.Option("--ranks", min=1, help="With --dry-run: number of processes that the memory is estimated for.")]


def show_dry_run(config: Config, *, ranks: int, console: Console) -> None:
    """Check and print. Raises SystemExit with code 2 if something is wrong."""
    from launch.estimate.dry_run import dry_run

    found = dry_run(config, ranks=ranks)
    console.result("\n".join(found.lines()), data=found.to_json())
    if not found.ok:
        raise SystemExit(2)
