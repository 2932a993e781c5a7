"""`tim launch`: training with several processes, on this machine or on a cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import one_config
from launch.command_options import ConfigArgument, Debug, Json, Replan
from launch.console import STOPPED, Console, session
from launch.logs.startup import STARTUP
from launch.text_tables import count

if TYPE_CHECKING:
    from launch.clusters.hosts import Host
    from launch.config.schema import Config

Hostfile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Start on the hosts of this file by ssh: a line `NAME slots=N` for each, as for DeepSpeed."),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Number of training processes on each machine: one per GPU. Default with --hostfile: the slots of the host."),
]
Machines = Annotated[
    int | None,
    typer.Option(min=1, help="Number of machines; run the command on each of them. With --hostfile: the first so many. Default: 1."),
]
Rank = Annotated[
    int | None, typer.Option(min=0, help="Index of this machine, from 0. Give it on all machines, or on none: then torchrun numbers them.")
]
Restarts = Annotated[
    int, typer.Option(min=0, help="How often to start all processes again from the newest checkpoint after one died or hung.")
]


def launch(
    config: ConfigArgument,
    nproc_per_node: Processes = None,
    nnodes: Machines = None,
    node_rank: Rank = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Address of machine 0, and a free port there.")] = None,
    hostfile: Hostfile = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit a Slurm job; config section `cluster`.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Print a Kubernetes Job for kubectl; config section `cluster`.")] = False,
    max_restarts: Restarts = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, commands or job script without running it.")] = False,
    replan: Replan = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train with several processes, on one or more machines.

    The processes run under torchrun and never outlive this command. Resumes an existing run in run_dir, also with a different number of
    processes: samples and random draws of each step stay the same. Names the process that died or hung, and what it was doing.

    Example: tim launch photos --nproc-per-node 2 corpus=corpus run_dir=runs/first
    """
    with session(as_json=as_json, debug=debug) as console, STARTUP.shown("importing torch"):
        from launch.clusters.hosts import read_hostfile

        source, overrides = one_config(config)
        _check_target(hostfile=hostfile, slurm=slurm, k8s=k8s, nproc=nproc_per_node, node_rank=node_rank, endpoint=rdzv_endpoint)
        hosts = [] if hostfile is None else read_hostfile(hostfile)
        if hostfile is not None and nnodes is not None and nnodes > len(hosts):
            raise ValueError(f"--nnodes {nnodes}: {hostfile} lists {len(hosts)}")
        from launch.config.load import load_config

        options = [*["--debug"] * debug, *["--replan"] * replan]
        settings = load_config(source, overrides=overrides)
        job = _Launch(source, overrides, options, settings, max_restarts=max_restarts, dry_run=dry_run, console=console)
        if hostfile is not None:
            code = job.on_hosts(hosts[:nnodes], nproc=nproc_per_node, endpoint=rdzv_endpoint)
        elif slurm or k8s:
            assert nproc_per_node is not None, "_check_target has checked it"
            code = (job.on_slurm if slurm else job.on_kubernetes)(nproc=nproc_per_node, nnodes=nnodes or 1)
        else:
            assert nproc_per_node is not None, "_check_target has checked it"
            code = job.here(nproc=nproc_per_node, nnodes=nnodes or 1, node_rank=node_rank, endpoint=rdzv_endpoint)
        if code is None:
            return
        job.report(code)
        raise SystemExit(code)


def _check_target(*, hostfile: Path | None, slurm: bool, k8s: bool, nproc: int | None, node_rank: int | None, endpoint: str | None) -> None:
    """Raise ValueError for options that do not go together."""
    targets = [name for name, given in (("--hostfile", hostfile is not None), ("--slurm", slurm), ("--k8s", k8s)) if given]
    if len(targets) > 1:
        raise ValueError(f"{' and '.join(targets)} exclude each other: give one of them")
    if nproc is None and targets != ["--hostfile"]:
        raise ValueError("--nproc-per-node N: missing; give the number of processes on each machine (see `tim launch --help`)")
    if targets and node_rank is not None:
        raise ValueError(f"--node-rank {node_rank}: {targets[0]} numbers the machines itself; leave it out")
    if targets in (["--slurm"], ["--k8s"]) and endpoint is not None:
        raise ValueError(f"--rdzv-endpoint {endpoint}: {targets[0]} chooses it itself; leave it out")


@dataclass(frozen=True)
class _Launch:
    """A training to start. Methods return its exit code; None if they have printed what there is to print."""

    source: str
    overrides: list[str]
    options: list[str]
    config: Config
    max_restarts: int
    dry_run: bool
    console: Console

    def here(self, *, nproc: int, nnodes: int, node_rank: int | None, endpoint: str | None) -> int | None:
        from launch.distributed import torchrun

        layout = {"nproc_per_node": nproc, "nnodes": nnodes, "node_rank": node_rank, "rdzv_endpoint": endpoint}
        given = {"overrides": self.overrides, **layout, "options": self.options, "max_restarts": self.max_restarts}
        arguments = torchrun.torchrun_arguments(self.source, **given)
        run_dir = self._check()
        if self.dry_run:
            line = torchrun.command_line(arguments, nproc_per_node=nproc)
            self.console.result(line, data={"command": line})
            return None
        return torchrun.launch(self.source, **given, run_dir=run_dir, hang_limits=self.config.train.hang_limits)

    def on_hosts(self, hosts: Sequence[Host], *, nproc: int | None, endpoint: str | None) -> int | None:
        """nproc: number of processes on each host, instead of its slots."""
        from launch.clusters import hosts as ssh

        hosts = [ssh.Host(host.name, nproc or host.slots) for host in hosts]
        commands = ssh.host_commands(hosts, endpoint=endpoint, arguments=self._arguments())
        self._check()
        setup = self.config.cluster.setup
        if self.dry_run:
            lines = [f"{name}: {shlex.join(command)}" for name, command in commands.items()]
            reached = [shlex.join(ssh.ssh_command(host, setup=setup)) for host in commands]
            self.console.result("\n".join(lines), data={"commands": commands, "ssh": reached})
            return None
        environment = {**ssh.shared_environment(os.environ), **self.config.cluster.env}
        return ssh.run_on_hosts(commands, environment=environment, setup=setup)

    def on_slurm(self, *, nproc: int, nnodes: int) -> None:
        from launch.clusters import slurm

        run_dir, workers = self._check(), self.config.loader.workers
        job = slurm.Job(run_dir=run_dir, nnodes=nnodes, nproc=nproc, workers=workers, arguments=self._arguments())
        script = slurm.job_script(job, self.config.cluster)
        if self.dry_run:
            self.console.result(script.rstrip("\n"), data={"script": script})
            return
        number, path = slurm.submit(job, script, is_private=bool(self.config.cluster.env))
        text = f"submitted Slurm job {number}: {path}, log in the same folder"
        self.console.result(text, data={"job": number, "script": path, "run": run_dir})

    def on_kubernetes(self, *, nproc: int, nnodes: int) -> None:
        """The corpus is not checked: it is on a volume of the cluster."""
        from launch.clusters.kubernetes import manifest
        from launch.training.planning import required_run_dir

        layout = {"nnodes": nnodes, "nproc": nproc, "workers": self.config.loader.workers}
        arguments = self._arguments()[1:]
        text = manifest(required_run_dir(self.config), self.config.cluster, config=self.source, arguments=arguments, **layout)
        self.console.result(text.rstrip("\n"), data={"manifest": text})

    def report(self, code: int) -> None:
        """Print how the training ended."""
        run_dir = self.config.run_dir
        assert run_dir is not None, "checked before the start"
        if code not in (0, STOPPED):
            self.console.failure(f"training ended with exit code {code}: see the lines above", code=code)
        elif code == STOPPED:
            self.console.result(f"{run_dir}: stopped by a signal, checkpoint saved", data={"run": run_dir, "exit": code})
        else:
            print_result(self.console, run_dir, steps=self.config.train.steps)

    def _arguments(self) -> list[str]:
        """Arguments of `tim launch` on a machine of the job, without its place."""
        return [self.source, *self.overrides, *self.options, "--max-restarts", str(self.max_restarts)]

    def _check(self) -> Path:
        from launch.training.planning import check_ready

        STARTUP.stage("checking corpus, models and plan")
        run_dir = check_ready(self.config)
        STARTUP.end()  # rank 0 goes on
        return run_dir


def print_result(console: Console, run_dir: Path, *, steps: int) -> None:
    """Print how a training that is complete ended."""
    from launch.training.metrics import last_row

    model = run_dir / "model"
    data = {"run": run_dir, "model": model, "steps": steps, "last": last_row(run_dir / "metrics.jsonl")}
    console.result(f"{model}: trained for {count(steps, 'step')}", data=data)
