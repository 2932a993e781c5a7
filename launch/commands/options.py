"""Options that many commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and all warnings of other libraries.")]
ConfigArgument = Annotated[
    list[str], typer.Argument(metavar="CONFIG|KEY=VALUE", help="A YAML file or a recipe's name, and values that replace its own.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; the result does not depend on their number. Default: one for each core.")
]
