"""Start one training process per device with torchrun, and leave no orphan processes.

The kernel kills workers when their launcher dies, even by `kill -9`. Signals are forwarded to the workers, which run in sessions of their
own (`launch.distributed.signals` says what they do); the launcher waits for them without a timeout. A supervisor reports ranks that die or
hang.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from unittest import mock

from launch.distributed.heartbeat import LAUNCHER
from launch.distributed.rendezvous import exit_on_signals, rendezvous_arguments, socket_environment
from launch.distributed.signals import HANDLED
from launch.distributed.stacks import nccl_environment
from launch.distributed.supervisor import Supervisor
from launch.logs.startup import STARTUP

PR_SET_PDEATHSIG = 1
_COMMAND = ("--signals-to-handle=SIGQUIT", "-m", "launch.cli")


def launch(
    config: str | Path,
    *,
    overrides: Sequence[str] = (),
    nproc_per_node: int,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
    options: Sequence[str] = (),
    max_restarts: int = 0,
    run_dir: Path | None = None,
    hang_limits: Mapping[str, float] | None = None,
) -> int:
    """Train with `nproc_per_node` processes on each of `nnodes` machines. Run it once on every machine. Returns the exit code.

    Args:
        config: a YAML file or a recipe's name.
        node_rank: index of this machine; None: torchrun numbers the machines.
        rdzv_endpoint: host:port of machine 0 for the rendezvous; required with more than one machine.
        options: options of `tim train`, placed before the config, e.g. `--debug`.
        max_restarts: how often to start all ranks again from the newest checkpoint after one died or hung.
        run_dir: the run folder, where ranks write what they are doing.
        hang_limits: seconds that a rank may spend in a section, by section (`TrainConfig.hang_limits`); None: no limits.

    Raises:
        ValueError: an invalid layout.
    """
    arguments = torchrun_arguments(
        config,
        overrides=overrides,
        nproc_per_node=nproc_per_node,
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv_endpoint=rdzv_endpoint,
        options=options,
        max_restarts=max_restarts,
    )
    os.environ.update(socket_environment(rdzv_endpoint, nnodes=nnodes))
    with _nccl_folder() as nccl:
        supervisor = Supervisor(run_dir=run_dir, limits=hang_limits or {}, max_restarts=max_restarts, nccl=nccl, machines=nnodes)
        return _torchrun(arguments, processes=nproc_per_node, supervisor=supervisor, endpoint=rdzv_endpoint)


def run_in_processes(
    command: Sequence[str], *, processes: int, nnodes: int = 1, node_rank: int | None = None, rdzv_endpoint: str | None = None
) -> int:
    """Run `tim COMMAND…` in `processes` processes on each of `nnodes` machines, connected by torchrun. Returns the exit code.

    Arguments are those of `launch`. Raises ValueError for an invalid layout.
    """
    layout = _layout(processes, nnodes=nnodes, node_rank=node_rank, rdzv_endpoint=rdzv_endpoint)
    os.environ.update(socket_environment(rdzv_endpoint, nnodes=nnodes))
    supervisor = Supervisor(run_dir=None, limits={}, machines=nnodes)
    return _torchrun([*layout, *_COMMAND, *command], processes=processes, supervisor=supervisor, endpoint=rdzv_endpoint)


def _torchrun(arguments: Sequence[str], *, processes: int, supervisor: Supervisor, endpoint: str | None) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    from launch.distributed.agent import SupervisedAgent

    os.environ.update(worker_environment(processes))
    if supervisor.nccl is not None:
        os.environ.update({name: os.environ.get(name, value) for name, value in nccl_environment(supervisor.nccl).items()})
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the workers and the supervisor report errors
    others = supervisor.machines - 1
    waiting = f"waiting for {others} other machine{'s' if others > 1 else ''} at {endpoint}"
    shown = STARTUP.shown(waiting) if others else nullcontext()  # until the supervisor sees ranks
    agent = mock.patch.object(api, "LocalElasticAgent", partial(SupervisedAgent, supervisor))
    with _forwarded_signals(supervisor), agent, shown:
        try:
            torchrun.run(torchrun.parse_args(list(arguments)))
        except ChildFailedError:
            return supervisor.exit_code
    return 0


def command_line(arguments: Sequence[str], *, nproc_per_node: int) -> str:
    """Shell command equivalent to `launch`, for `--dry-run`."""
    environment = {key: value for key, value in worker_environment(nproc_per_node).items() if key != LAUNCHER}
    settings = [f"{key}={value}" for key, value in environment.items()]
    return shlex.join(["env", *settings, sys.executable, "-m", "torch.distributed.run", *arguments])


def torchrun_arguments(
    config: str | Path,
    *,
    overrides: Sequence[str],
    nproc_per_node: int,
    nnodes: int,
    node_rank: int | None,
    rdzv_endpoint: str | None,
    options: Sequence[str] = (),
    max_restarts: int = 0,
) -> list[str]:
    """Arguments of torchrun. Raises ValueError for an invalid layout."""
    layout = _layout(nproc_per_node, nnodes=nnodes, node_rank=node_rank, rdzv_endpoint=rdzv_endpoint)
    restarts = [f"--max-restarts={max_restarts}"] * (max_restarts > 0)
    return [*layout, *restarts, *_COMMAND, "train", *options, str(config), *overrides]


def _layout(nproc_per_node: int, *, nnodes: int, node_rank: int | None, rdzv_endpoint: str | None) -> list[str]:
    """Arguments of torchrun for processes and machines. Raises ValueError if they do not fit."""
    if nproc_per_node < 1 or nnodes < 1:
        raise ValueError(f"--nproc-per-node {nproc_per_node} --nnodes {nnodes}: both must be at least 1")
    rendezvous = rendezvous_arguments(rdzv_endpoint, nnodes=nnodes, node_rank=node_rank)
    return [f"--nnodes={nnodes}", f"--nproc-per-node={nproc_per_node}", *rendezvous]


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment(nproc_per_node: int) -> dict[str, str]:
    """Environment variables for workers. Threads are limited so that processes × threads does not exceed the cores."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // nproc_per_node))
    return {LAUNCHER: str(os.getpid()), "OMP_NUM_THREADS": threads}


def die_with_launcher() -> None:
    """Have the kernel kill this worker when its launcher dies; exit if it is already dead. Linux only; no-op outside torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)


@contextmanager
def _forwarded_signals(supervisor: Supervisor) -> Iterator[None]:
    """Forward signals to the workers and keep waiting for them; torchrun itself would kill them after 30 seconds."""

    def forward(number: int, frame: FrameType | None) -> None:
        supervisor.stopping |= number != signal.SIGUSR1  # no restart
        for worker in _workers():
            os.kill(worker, number)

    previous = {number: signal.signal(number, forward) for number in HANDLED}
    try:
        with exit_on_signals(lambda: supervisor.waits_for_machines):
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _nccl_folder() -> Iterator[Path | None]:
    """Temporary folder for NCCL's flight recorder; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tim-nccl-") as folder:
        yield Path(folder)


def _workers() -> list[int]:
    """Child processes that are ranks."""
    children = [int(pid) for tasks in Path("/proc/self/task").glob("*/children") for pid in tasks.read_text().split()]
    return [child for child in children if _is_rank(child)]


def _is_rank(process: int) -> bool:
    try:
        return b"\0LOCAL_RANK=" in Path(f"/proc/{process}/environ").read_bytes()
    except OSError:  # it has just ended
        return False
