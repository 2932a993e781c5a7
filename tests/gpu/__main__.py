"""`python -m tests.gpu`: run all checks that need a GPU, and print one table as JSON on standard output, a readable one on standard error.

    python -m tests.gpu --out gpu.json                all, within ten minutes
    python -m tests.gpu --only attention --only zero  some
    python -m tests.gpu --device cpu --tiny           the same logic with tiny sizes, without a GPU

Exit code: 0 if all checks passed or there is no GPU, 1 if one did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.gpu import runner
from tests.gpu.checks import CHECKS

BUDGET = 570.0  # seconds


def main() -> int:
    arguments = _arguments()
    _set_environment(arguments.device)
    facts = _facts(arguments.device)
    if facts is None:
        print("no CUDA device is visible: nothing was checked; --device cpu --tiny runs the same checks on the CPU", file=sys.stderr)
        print(json.dumps({"passed": None, "checks": []}))
        return 0

    start = time.monotonic()
    checks = [check for check in CHECKS if arguments.only is None or check.name in arguments.only]
    limits = {"start_seconds": 120.0}
    if arguments.device == "cpu":  # a busy machine may take any time
        checks, limits = [check._replace(seconds=arguments.budget) for check in checks], {"start_seconds": arguments.budget}
    rows: list[runner.Row] = []

    def summary() -> runner.Row:
        passed = len(rows) == len(checks) and all(row["outcome"] == "passed" for row in rows)
        return {**facts, "passed": passed, "seconds": round(time.monotonic() - start, 1), "checks": rows}

    def report(row: runner.Row) -> None:
        rows.append(row)
        runner.show(row)
        runner.write(arguments.out, summary())

    body = partial(runner.work, device=arguments.device, tiny=arguments.tiny)
    runner.run(checks, body, budget=arguments.budget, report=report, **limits)
    print(json.dumps(summary()))
    return 0 if summary()["passed"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here, after every check")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the checks themselves")
    parser.add_argument("--only", action="append", metavar="CHECK", choices=[check.name for check in CHECKS])
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all checks together")
    return parser.parse_args()


def _set_environment(device: str) -> None:
    """For the workers: DeepSpeed's accelerator and deterministic cuBLAS are read from the environment."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ["PYTHONWARNINGS"] = "ignore"  # the table is easier to find
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # one rank, whoever started this
        os.environ.pop(name, None)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _facts(device: str) -> dict[str, Any] | None:
    """What the checks run on; None without the device."""
    if device == "cpu":
        return {"device": "CPU", "torch": version("torch")}
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
