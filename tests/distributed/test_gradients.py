"""Gradients of every ZeRO stage equal those of one process, with derivative, guidance and alignment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import jobs

TOLERANCES = {"jvp": 1e-6, "finite-difference": 1e-4}  # relative; a finite difference amplifies rounding
CASES = [*(f"{stage}:jvp" for stage in (0, 1, 2)), *(f"{stage}:finite-difference" for stage in (0, 1, 2, 3))]
WORKER = "tests.distributed.gradient_worker"


def check_reports(folder: Path, *, ranks: int) -> None:
    for rank in range(ranks):
        errors = json.loads((folder / f"errors-{rank}.json").read_text())
        assert list(errors) == CASES
        for case, error in errors.items():
            assert error < TOLERANCES[case.partition(":")[2]], (rank, errors)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.soak)])
def test_gradients_of_several_ranks_are_those_of_one_process(tmp_path: Path, ranks: int) -> None:
    jobs.run_ranks(WORKER, str(tmp_path / "errors"), *CASES, log=tmp_path / "log", ranks=ranks)
    check_reports(tmp_path, ranks=ranks)
