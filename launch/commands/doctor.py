"""Command `tim doctor`: what this machine, or every node, has for training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.commands.options import Debug, Json
from launch.console import Console, session

REPORT = "TIM_DOCTOR_REPORT"  # environment variable: where rank 0 writes the report


def doctor(
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Measure matrix products, memory and all-reduce on every rank, and name slow nodes.")
    ] = False,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="With --nodes: number of processes on this machine: one per GPU.")] = 1,
    nnodes: Annotated[int, typer.Option(min=1, help="With --nodes: number of machines; run the command on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="With --nodes: index of this machine, from 0.")] = 0,
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
    with session(as_json=as_json, debug=debug) as console:
        if not nodes:
            _examine(run_dir, console)
            return
        if nnodes > 1 and rdzv_endpoint is None:
            raise ValueError("--nnodes: needs --rdzv-endpoint HOST:PORT, the address of machine 0")
        if "RANK" in os.environ or nproc_per_node * nnodes == 1:
            _measure(console)
            return
        arguments = [f"--nnodes={nnodes}", f"--nproc-per-node={nproc_per_node}", f"--node-rank={node_rank}"]
        arguments += ["--standalone"] if nnodes == 1 else _master(rdzv_endpoint or "")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "launch.cli", "doctor", "--nodes"]
            environment = {"OMP_NUM_THREADS": "1", **os.environ, REPORT: str(report)}
            if subprocess.run(command, env=environment, check=False).returncode:
                raise RuntimeError("the measurement failed: see the lines above")
            if not report.is_file():
                console.result("measured: machine 0 has the report", data={"ranks": [], "slow": [], "differences": []})
                return
            _show(json.loads(report.read_text(encoding="utf-8")), console)


def _master(endpoint: str) -> list[str]:
    """torchrun's arguments for machine 0. Raises ValueError."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--rdzv-endpoint {endpoint}: expected HOST:PORT")
    return [f"--master-addr={host}", f"--master-port={port}"]


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


def _measure(console: Console) -> None:
    """Measure as one of the ranks. Rank 0 prints the report, or writes it for the command that has started the ranks."""
    from launch.distributed.ranks import process_group
    from launch.hardware.nodes import measure_nodes

    with process_group() as ranks:
        report = measure_nodes(ranks).to_json()
        is_main = ranks.is_main
    if is_main and REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(json.dumps(report), encoding="utf-8")
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
