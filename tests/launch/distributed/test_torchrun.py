from __future__ import annotations

import os
import shlex

import pytest

from launch.distributed.torchrun import command_line, torchrun_arguments, worker_environment

ONE_NODE = {"overrides": ["train.steps=3"], "nproc_per_node": 2, "nnodes": 1, "node_rank": 0, "rdzv_endpoint": None}


def test_one_machine_meets_by_itself() -> None:
    arguments = torchrun_arguments("photos", **ONE_NODE)
    assert "--standalone" in arguments
    assert arguments[-5:] == ["-m", "launch.cli", "train", "photos", "train.steps=3"]


def test_several_machines_meet_at_the_first() -> None:
    arguments = torchrun_arguments("photos", **{**ONE_NODE, "nnodes": 4, "node_rank": 3, "rdzv_endpoint": "host-0:2900"})
    assert {"--nnodes=4", "--master-addr=host-0", "--master-port=2900", "--node-rank=3"} <= set(arguments)
    assert "--standalone" not in arguments


IMPOSSIBLE = [
    ({"nproc_per_node": 0}, "both must be at least 1"),
    ({"nnodes": 2}, "needs --rdzv-endpoint HOST:PORT"),
    ({"nnodes": 2, "rdzv_endpoint": "host"}, "give HOST:PORT"),
    ({"nnodes": 2, "rdzv_endpoint": "host:1", "node_rank": 2}, "between 0 and 1"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_impossible_layouts(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchrun_arguments("photos", **{**ONE_NODE, **change})


def test_threads_fill_the_cores_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert worker_environment(10 * cores)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environment(2)["OMP_NUM_THREADS"] == "3"


def test_the_command_can_be_typed() -> None:
    words = shlex.split(command_line(torchrun_arguments("my file.yaml", **ONE_NODE), nproc_per_node=2))
    assert words[0] == "env"
    assert "my file.yaml" in words
    assert not any("TIM_LAUNCHER_PID" in word for word in words)
