"""Command line: `tim COMMAND …`. Each command parses its arguments, calls one function, and prints the result.

torch, deepspeed and modules that need them are imported inside the commands, so that `tim --help` is fast and every command needs only its
own libraries.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import cast

import typer

from launch.command_options import copyable_examples
from launch.commands.bench import bench
from launch.commands.corpus import annotate, encode, index, prepare, report, score, verify
from launch.commands.doctor import doctor
from launch.commands.estimate import estimate
from launch.commands.eval import eval
from launch.commands.finetune import finetune
from launch.commands.launch import launch
from launch.commands.model import demo, export, plan, pull, recipes, train
from launch.commands.plot import plot
from launch.commands.preview import preview
from launch.commands.sample import sample
from launch.commands.serve import serve
from launch.console import session
from pipeline.foreign_warnings import hide_foreign_warnings, show_all_warnings

# in the order of `tim --help`
COMMANDS = (
    demo,
    prepare,
    index,
    encode,
    verify,
    report,
    score,
    annotate,
    recipes,
    plan,
    estimate,
    train,
    launch,
    finetune,
    preview,
    plot,
    sample,
    eval,
    serve,
    export,
    pull,
    doctor,
)
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__bases__[0])  # typer does not export it

app = typer.Typer(
    help="Text-to-image Transition Models at native resolution: prepare a corpus, plan its packs, train, sample, evaluate.",
    epilog="Begin with `tim demo`; `tim COMMAND --help` shows options and an example.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)
for registered in (*app.registered_commands, *bench.registered_commands):
    registered.help = copyable_examples(inspect.getdoc(registered.callback) or "")
app.add_typer(bench, name="bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tim`; returns the exit code, or raises SystemExit with it (see `launch.console`). Usage errors are also reported in one line."""
    arguments = _without_local_rank(list(sys.argv[1:] if argv is None else argv)) or ["--help"]
    if "--debug" in arguments:
        show_all_warnings()
    else:
        hide_foreign_warnings()
    try:
        return app(arguments, prog_name="tim", standalone_mode=False) or 0
    except USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tim"
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        with session(as_json="--json" in arguments, debug="--debug" in arguments):
            raise ValueError(f"{message} (see `{command} --help`)") from error


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Drop the first argument that the `deepspeed` launcher adds: LOCAL_RANK has it too."""
    return arguments[1:] if arguments and arguments[0].startswith(("--local_rank=", "--local-rank=")) else arguments


if __name__ == "__main__":
    sys.exit(main())
