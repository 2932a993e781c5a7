"""Activation checkpointing under every ZeRO stage, on two real ranks, gives the gradients of one process without it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed import jobs


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    jobs.run_ranks("tests.distributed.checkpointing_worker", str(tmp_path))
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(report) == {"1-1", "2-2", "3-1"}
        assert max(report.values()) < 1e-6, report
