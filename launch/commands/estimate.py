"""Before a run: `tim estimate` for memory, time and price, and `tim train --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.arguments import one_config
from launch.command_options import ConfigArgument, Debug, Json
from launch.console import Console, session
from launch.logs.startup import STARTUP

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
COLUMNS = {
    "weights": ("weights", "gathered weights"),
    "grads": ("gradients",),
    "moments": ("moments",),
    "EMA": ("averages",),
    "frozen": ("codec", "text encoder", "teacher", "guidance network"),
    "temp.": ("buffers",),
    "act.": ("activations",),
}


def estimate(
    config: ConfigArgument,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs, one rank on each.")] = 1,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="GPU: h100, h200, b200, a100, 5090, 4090, 3090, 3060 … or one of --devices.")
    ] = "h100",
    price: Annotated[float | None, typer.Option(min=0, help="US dollars per GPU and hour, instead of the table's.")] = None,
    devices: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML table of further GPUs, as in configs/hardware.")] = None,
    cached: Annotated[bool, typer.Option("--cached", help="Assume that latents and texts come from `tim encode`.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate memory, time and price of a training.

    Memory per GPU under every ZeRO stage, with and without checkpointing, from the network's own passes; operations from the plan of the
    corpus, or without one from the limits of the config. Needs no GPU.

    Example: tim estimate t2i-xl-1 --gpus 8 --device h100
    """
    with session(as_json=as_json, debug=debug) as console, STARTUP.shown("importing torch"):
        from launch.config.load import load_config
        from launch.estimate.estimate import Situation
        from launch.estimate.estimate import estimate as run_estimate
        from launch.hardware.devices import find_device

        source, overrides = one_config(config)
        found = find_device(device, table=devices)
        if price is not None:
            found = found.model_copy(update={"price": price})
        settings, situation = load_config(source, overrides=overrides), Situation(ranks=gpus, device=found, cached=cached)
        with console.progress() as report:
            facts = run_estimate(settings, situation, progress=report)
        console.result(describe(str(source), facts), data={"config": str(source), **facts})


def describe(name: str, facts: Mapping[str, Any]) -> str:
    """The estimate as text."""
    device, chosen, work = facts["device"], facts["chosen"], facts["work"]
    trained = "all trained" if facts["trained"] == facts["parameters"] else f"{facts['trained'] / 1e6:,.1f}M trained"
    lines = [
        f"{name} on {facts['ranks']} × {device['title']}: {device['usable'] / 1e9:,.1f} of {device['memory'] / 1e9:,.0f} GB for tensors",
        f"{facts['parameters'] / 1e6:,.1f}M parameters, {trained} · {facts['optimizer']} · {facts['precision']} · "
        f"packs of {facts['tokens_per_pack']:,} tokens, {facts['packs_per_rank']} for each rank",
        "",
        "GB per GPU by ZeRO stage and checkpointing, and the largest pack in tokens (* as configured, ! does not fit):",
        *_table([*facts["settings"], *([] if _listed(chosen, facts["settings"]) else [chosen])], chosen=chosen),
        "",
        f"peak: {chosen['peak'] / 1e9:,.1f} GB in the phase {chosen['phase']}; host memory {facts['host_bytes'] / 1e9:,.1f} GB per rank "
        "while saving",
        f"steps: {work['images']:,.1f} images, {work['tokens']:,.0f} tokens, {work['flops'] / facts['steps']:.3g} FLOP each "
        f"({work['source']})",
        f"time: {facts['step_seconds']:,.3g} s a step at {device['efficiency']:.0%} of the GPU's matrix products, {facts['hours']:,.1f} h, "
        f"{facts['device_hours']:,.0f} GPU hours",
        f"price: ${facts['price']:,.0f} at ${device['price']:,.2f} per GPU and hour",
        f"limit: {facts['limit']}",
        *(f"change: {change}" for change in facts["changes"]),
        *(f"note: {note}" for note in facts["notes"]),
    ]
    return "\n".join(lines)


def _listed(chosen: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> bool:
    return any(_key(chosen) == _key(setting) for setting in settings)


def _key(setting: Mapping[str, Any]) -> tuple[int, str]:
    return setting["zero"], setting["checkpointing"]


def _table(settings: Sequence[Mapping[str, Any]], *, chosen: Mapping[str, Any]) -> list[str]:
    rows = [["ZeRO", "ckpt", *COLUMNS, "peak", "largest"]]
    for setting in settings:
        parts = [sum(setting["parts"].get(part, 0.0) for part in names) for names in COLUMNS.values()]
        mark = "*" if _key(setting) == _key(chosen) else ""
        peak = f"{setting['peak'] / 1e9:,.1f}{'' if setting['fits'] else '!'}"
        rows.append([f"{mark}{setting['zero']}", setting["checkpointing"], *(f"{part / 1e9:,.1f}" for part in parts), peak])
        rows[-1].append(f"{setting['largest_pack']:,}" if setting["largest_pack"] else "none")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def show_dry_run(config: Config, *, ranks: int, console: Console) -> None:
    """Check a run without a step, and print what was found. Raises SystemExit with code 2 if something is wrong."""
    from launch.estimate.dry_run import dry_run

    found = dry_run(config, ranks=ranks)
    console.result("\n".join(found.lines()), data=found.to_json())
    if not found.ok:
        raise SystemExit(2)
