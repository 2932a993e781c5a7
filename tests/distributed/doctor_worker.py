"""Run by test_nodes.py on two ranks: measures nodes with products at a third of their rate on rank 1, then really.

Arguments: a file for the reports, and `busy` to let another process use the processor of rank 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.distributed.ranks import Ranks, process_group
from launch.hardware.nodes import MEASURES, measure_nodes


def matmul(ranks: Ranks) -> float:
    return 1e9 if ranks.is_main else 3e8


def equal(ranks: Ranks) -> float:
    return 1e9


@contextmanager
def shared_processor(ranks: Ranks, *, busy: bool) -> Iterator[None]:
    """Give each rank a processor of its own, and rank 1's also to processes that are always busy."""
    if not busy:
        yield
        return
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[ranks.rank]})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(0 if ranks.is_main else 3)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    with process_group() as ranks, shared_processor(ranks, busy=sys.argv[2:] == ["busy"]):
        report = measure_nodes(ranks, measures={"matmul": matmul, "memory": equal})
        real = measure_nodes(ranks, measures=MEASURES)
        if ranks.is_main:
            Path(sys.argv[1]).write_text(json.dumps([report.to_json(), real.to_json()]))


if __name__ == "__main__":
    main()
