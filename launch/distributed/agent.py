"""torchrun's agent, with our supervisor: it decides when a failed attempt is over, what is said of it, and whether there is another."""

from __future__ import annotations

from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from launch.distributed.supervisor import Supervisor


class SupervisedAgent(LocalElasticAgent):
    """An elastic agent whose workers a `Supervisor` watches."""

    def __init__(self, supervisor: Supervisor, **settings: Any) -> None:
        super().__init__(**settings)
        self._supervisor = supervisor

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Called ten times a second. The supervisor looks first: torchrun would end the other ranks at once, and restart after any exit."""
        pids = {worker.global_rank: worker.id for worker in worker_group.workers}
        if self._supervisor.watch(pids):
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]  (its decorator has no types)
        if result.is_failed() and not self._supervisor.conclude():
            self._remaining_restarts = 0
        return result
