"""Checks for test_gpu.py that fail in every way. Without torch, so that their processes start fast."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.gpu import runner
from tests.gpu.runner import Check, Result


def works(case: object) -> Result:
    return Result({"error": 0.5, "words": "fine"}, {"error": 1.0}, {"the case is passed on": case == "case"})


def fails(case: object) -> Result:
    return Result({"error": 2.0, "nothing": float("nan")}, {"error": 1.0, "nothing": 1.0}, {"the sky is green": False})


def raises(case: object) -> Result:
    raise ValueError("no such kernel\nin line 7")


def dies(case: object) -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hangs(case: object) -> Result:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["TIM_TEST_CHILD"]).write_text(str(child.pid))
    time.sleep(600)
    raise AssertionError


def body(pipe: Connection, checks: Sequence[Check]) -> None:
    runner.serve(pipe, checks, "case", release=lambda: None)
