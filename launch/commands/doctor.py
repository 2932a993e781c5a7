"""Command `tim doctor`: what this machine, or every node, has for training."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.command_options import Debug, Json
from launch.console import Console, session
from launch.logs.startup import STARTUP
from pipeline.storage.atomic import publish_text

REPORT = "TIM_DOCTOR_REPORT"  # environment variable: where the first rank of a machine writes the report


def doctor(
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Measure matrix products, memory and all-reduce on every rank, and name slow nodes.")
    ] = False,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="With --nodes: number of processes on this machine: one per GPU.")] = 1,
    nnodes: Annotated[int, typer.Option(min=1, help="With --nodes: number of machines; run the command on each of them.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="With --nodes: index of this machine, from 0. Give it on all machines, or on none.")
    ] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="With --nodes: address of machine 0.")] = None,
    run_dir: Annotated[Path, typer.Option(metavar="PATH", help="Folder whose disk is examined.")] = Path("."),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Examine this machine before a training.

    Versions, devices, interconnect, attention backends, compiler, limits, disk and clock, with remedies. With --nodes, run it on every
    machine as `tim launch`, or under torchrun: exit code 1 if a node is slower than 85 % of the median.

    Example: tim doctor
    """
    with session(as_json=as_json, debug=debug) as console, STARTUP.shown("importing torch"):
        given = {"--nproc-per-node": nproc_per_node > 1, "--nnodes": nnodes > 1, "--node-rank": node_rank is not None}
        given["--rdzv-endpoint"] = rdzv_endpoint is not None
        if not nodes and (alone := [name for name, is_given in given.items() if is_given]):
            raise ValueError(f"{alone[0]}: needs --nodes, which measures")
        if not nodes:
            _examine(run_dir, console)
        elif "RANK" in os.environ or nproc_per_node * nnodes == 1:
            _measure(console)
        else:
            _measure_in_processes(nproc_per_node, console, nnodes=nnodes, node_rank=node_rank, rdzv_endpoint=rdzv_endpoint)


def _examine(run_dir: Path, console: Console) -> None:
    from launch.hardware.environment import examine

    findings = examine(run_dir)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:7}  {finding.name:{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':7}  {'':{width}}  → {finding.remedy}")
    warnings = sum(finding.status == "warning" for finding in findings)
    lines.append(f"{warnings} warning{'s' if warnings != 1 else ''}")
    console.result("\n".join(lines), data={"warnings": warnings, "findings": [asdict(finding) for finding in findings]})


def _measure_in_processes(processes: int, console: Console, *, nnodes: int, node_rank: int | None, rdzv_endpoint: str | None) -> None:
    """Start the ranks of this machine, and print the report, which one of them writes. Raises RuntimeError if they fail."""
    from launch.distributed.failures import SILENT
    from launch.distributed.torchrun import run_in_processes

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        os.environ[REPORT] = str(report)
        layout = {"nnodes": nnodes, "node_rank": node_rank, "rdzv_endpoint": rdzv_endpoint}
        code = run_in_processes(["doctor", "--nodes"], processes=processes, **layout)
        if code in SILENT:
            raise SystemExit(code)
        if code:
            raise RuntimeError("the measurement failed: see the lines above")
        _show(json.loads(report.read_text(encoding="utf-8")), console)


def _measure(console: Console) -> None:
    """Measure as one of the ranks. Rank 0 prints the report. Under the command, the first rank of each machine writes it."""
    from launch.distributed.ranks import process_group
    from launch.distributed.torchrun import die_with_launcher
    from launch.hardware.nodes import measure_nodes

    die_with_launcher()
    STARTUP.stage("connecting the ranks")
    with process_group() as ranks:
        STARTUP.stage(f"measuring {ranks.size} rank{'s' if ranks.size > 1 else ''}")
        report = measure_nodes(ranks).to_json()
        is_main = ranks.is_main
    if REPORT in os.environ:
        if os.environ.get("LOCAL_RANK") == "0":
            publish_text(Path(os.environ[REPORT]), json.dumps(report))
    elif is_main:
        _show(report, console)


def _show(report: dict[str, Any], console: Console) -> None:
    """Print a report. Raises SystemExit with code 1 if a rank is slow."""
    lines = [f"{each['node']} rank {each['rank']}: {each['shown']}" for each in report["ranks"]]
    lines += [f"slow: {line}" for line in report["slow"]] or ["no rank is slow"]
    lines += [f"different: {line}" for line in report["differences"]]
    console.result("\n".join(lines), data=report)
    if report["slow"]:
        raise SystemExit(1)
