"""Shared command-line options."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print only one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors and all warnings of other libraries.")]
ConfigArgument = Annotated[list[str], typer.Argument(metavar="CONFIG|KEY=VALUE", help="A YAML file or a recipe, and overrides.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Number of processes; does not affect the result. Default: one per core.")]
Replan = Annotated[
    bool,
    typer.Option(
        "--replan",
        help="Resume with a new plan if corpora, batch or other inputs of the plan have changed; keeps weights, averages, step and "
        "learning rate.",
    ),
]
