"""Workers on a Ray cluster.

Each is an actor with its own worker process, as on one machine (`dataprep.workers.process`): a crashed decoder can be distinguished from a
lost node, and does not crash Ray. Sources and the work folder must be on storage that all nodes share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dataprep.workers.pool import Pool
from dataprep.workers.process import WORKER_MEMORY, LocalWorker, Report, WorkerDied
from pipeline.errors import one_line


class RayPool(Pool):
    """`workers` workers on the Ray cluster at `address`, by default one per CPU of the cluster. Without an address: the cluster running on
    this machine, or that of RAY_ADDRESS. Raises ValueError if there is no such cluster or it is too small."""

    def __init__(self, workers: int | None = None, *, address: str | None = None, memory: int = WORKER_MEMORY) -> None:
        cores = _connect(address)
        if workers is not None and workers > cores:
            raise ValueError(f"{workers} workers: the Ray cluster has {cores} CPUs, give no more")
        super().__init__(workers or cores, start=lambda: RayWorker(memory=memory))


class RayWorker:
    """An actor in the cluster. Same interface as `LocalWorker`, but all items of a task are reported at its end."""

    def __init__(self, *, memory: int) -> None:
        import ray

        host: Any = ray.remote(num_cpus=1, max_restarts=0)(_Host)
        self._actor: Any = host.remote(memory)
        self._is_alive = True

    def run(self, work: Callable[..., Any], task: Any, *, report: Report) -> Any:
        """Run `work` in the actor: its result or exception. Raises WorkerDied, also if the node is lost."""
        import ray
        from ray.exceptions import RayActorError

        try:
            kind, value, items = ray.get(self._actor.run.remote(work, task))
        except RayActorError as error:
            self._is_alive = False
            raise WorkerDied(f"a worker on the Ray cluster was lost ({one_line(error)})", at=-1) from error
        for item in items:
            report(item)
        if kind == "died":
            raise WorkerDied(value, at=items[-1] if items else -1)
        if kind == "error":
            raise value
        return value

    def is_alive(self) -> bool:
        return self._is_alive

    def kill(self) -> None:
        import ray

        self._is_alive = False
        ray.kill(self._actor)

    def close(self) -> None:
        """A killed actor needs no clean-up."""


class _Host:
    """The actor: runs tasks in its own worker process, and returns the outcome of each."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._worker: LocalWorker | None = None

    def run(self, work: Callable[..., Any], task: Any) -> tuple[str, Any, list[int]]:
        """("result", value), ("error", exception) or ("died", message), each with the reported items."""
        items: list[int] = []
        if self._worker is None or not self._worker.is_alive():
            self._worker = LocalWorker(memory=self._memory)
        try:
            return "result", self._worker.run(work, task, report=items.append), items
        except WorkerDied as death:
            return "died", str(death), items
        except Exception as error:
            return "error", error, items


def _connect(address: str | None) -> int:
    """Connect to the cluster unless this process is connected. Returns its number of CPUs."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("the Ray executor needs Ray: pip install 'tim[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            remedy = "start one with `ray start --head`, or give the address of one"
            raise ValueError(f"no Ray cluster at {address or 'the default address'} ({one_line(error)}): {remedy}") from error
    return int(ray.cluster_resources().get("CPU", 0))
