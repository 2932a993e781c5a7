"""Shared command-line options."""

from __future__ import annotations

from typing import Annotated, Any

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


def copyable_examples(help: str) -> str:
    """A docstring whose examples are one line each on a terminal of any width, so that they can be copied."""
    paragraphs = help.split("\n\n")
    return "\n\n".join(f"\b\n{' '.join(each.split())}" if each.startswith("Example: ") else each for each in paragraphs)


def typed_again(command: typer.Context) -> list[str]:
    """The arguments of a command, as a command line that means the same, without defaults."""
    typed, positional, given = [], [], names_given(command)
    for parameter in command.command.params:
        if parameter.name not in given:
            continue
        value = command.params[parameter.name]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if parameter.param_type_name == "argument":
            positional += [str(each) for each in values if each is not None]
        elif value is True:
            typed.append(parameter.opts[0])
        elif parameter.nargs > 1 and value is not None:
            typed += [parameter.opts[0], *map(_text, values)]
        elif value is not None and value is not False:
            typed += [part for each in values for part in (parameter.opts[0], _text(each))]
    return [*typed, "--", *positional]


def names_given(command: typer.Context) -> frozenset[str]:
    """Names of the parameters that the command line gives."""
    sources = {name: command.get_parameter_source(name) for name in command.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name != "DEFAULT")


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))
