"""The checks of `make gpu`: on the CPU with tiny sizes, so that they work the first time on a GPU, and each on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.gpu import runner
from tests.gpu.checks import CHECKS
from tests.gpu.misbehaving import body
from tests.gpu.runner import Check
from tests.processes import is_running

FAKES = "tests.gpu.misbehaving"


def checked(out: Path, *arguments: str) -> dict[str, object]:
    """Table of `python -m tests.gpu`; it must be the file's, too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert out.exists(), done.stderr
    table = json.loads(out.read_text())
    assert json.loads(done.stdout) == {**table, "seconds": json.loads(done.stdout)["seconds"]}
    assert (done.returncode == 0) == table["passed"]
    return table


def problems(table: dict[str, object]) -> list[object]:
    rows = table["checks"]
    assert isinstance(rows, list)
    return [(row["name"], row["outcome"], row.get("error"), row.get("traceback")) for row in rows if row["outcome"] != "passed"]


# Short: without compilation, which tests/tim/test_compiled.py covers.
@pytest.mark.parametrize(
    "names", [[check.name for check in CHECKS if "compile" not in check.name], pytest.param(None, marks=pytest.mark.soak)]
)
def test_every_check_passes_on_the_cpu(names: list[str] | None, tmp_path: Path) -> None:
    chosen = [f"--only={name}" for name in names or []]
    table = checked(tmp_path / "gpu.json", "--device", "cpu", "--tiny", "--budget", "3000", *chosen)
    assert not problems(table)
    rows = table["checks"]
    assert isinstance(rows, list)
    assert [row["name"] for row in rows] == [check.name for check in CHECKS if names is None or check.name in names]
    assert all(row["figures"] for row in rows)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_passes_on_a_gpu(check: Check, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible: `make gpu` needs one")
    assert not problems(checked(tmp_path / "gpu.json", f"--only={check.name}"))


def test_a_check_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIM_TEST_CHILD", str(tmp_path / "child"))
    names = ["works", "fails", "raises", "dies", "hangs", "works"]
    checks = [Check(name, f"{FAKES}:{name}", 8.0 if name == "hangs" else 600.0) for name in names]
    reported: list[runner.Row] = []
    rows = runner.run(checks, body, budget=3000.0, report=reported.append, start_seconds=600.0)
    assert rows == reported
    assert [row["outcome"] for row in rows] == ["passed", "failed", "crashed", "crashed", "timed out", "passed"]
    assert rows[0]["figures"] == {"error": 0.5, "words": "fine"}
    assert rows[1]["error"] == "error is 2, more than 1; nothing is nan, more than 1; not true: the sky is green"
    assert rows[1]["figures"]["nothing"] == "nan"
    assert rows[2]["error"] == "ValueError: no such kernel"
    assert rows[3]["error"] == "its process ended with signal SIGSEGV"
    assert rows[4]["error"] == "no result in 8 seconds"
    assert not is_running(int((tmp_path / "child").read_text())), "a process of the hung check is left"


def test_no_check_starts_when_the_time_is_over() -> None:
    (row,) = runner.run([Check("works", f"{FAKES}:works", 60.0)], body, budget=0.0, report=lambda row: None)
    assert row == {"name": "works", "outcome": "not run", "error": "no time was left"}


def test_without_a_gpu_a_sentence_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert "no CUDA device is visible: nothing was checked" in done.stderr
    assert json.loads(done.stdout) == {"passed": None, "checks": []}
