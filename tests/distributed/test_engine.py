"""Two real ranks under each ZeRO stage do what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints import checkpoint
from launch.distributed.ranks import Ranks
from tests.distributed import engine_worker, jobs

CASES = (
    "0-fp32-adamw",
    "1-fp32-adamw",
    "2-fp32-adamw",
    "3-fp32-adamw",
    "0-bf16-adamw",
    "2-bf16-adamw",
    "0-fp32-muon",
    "1-fp32-muon",
    "2-fp32-muon",
    "3-fp32-muon",
    "1-fp32-adamw-offload", "2-fp32-adamw-offload", "3-fp32-adamw-offload",
    "1-fp32-muon-offload", "3-fp32-muon-offload",
)  # fmt: skip
ELSEWHERE = {  # where one process goes on with what two ranks left; stage 3 would leave torch's linear patched for later tests
    "0-fp32-adamw": "2-fp32-adamw",
    "1-fp32-adamw": "0-fp32-adamw",
    "2-fp32-adamw": "2-fp32-adamw",
    "3-fp32-adamw": "1-fp32-adamw",
    "0-bf16-adamw": "1-bf16-adamw",
    "2-bf16-adamw": "0-bf16-adamw",
    "0-fp32-muon": "2-fp32-muon",
    "1-fp32-muon": "0-fp32-muon",
    "2-fp32-muon": "1-fp32-muon",
    "3-fp32-muon": "2-fp32-muon",
    "1-fp32-muon-offload": "0-fp32-muon",
    "3-fp32-muon-offload": "1-fp32-muon-offload",
    "1-fp32-adamw-offload": "1-fp32-adamw",
    "2-fp32-adamw-offload": "1-fp32-adamw-offload",
    "3-fp32-adamw-offload": "2-fp32-adamw-offload",
}
PARAMETERS = 7 * 33 + 33 + 33 * 33 + 33 + 33 * 20 + 20 + 20 * 5


Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left reports and checkpoints of all cases."""
    folder = tmp_path_factory.mktemp("engine")
    jobs.run_ranks("tests.distributed.engine_worker", str(folder), *CASES, log=folder / "log")
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> Reports:
    """By case, what each rank measured."""
    return {case: [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_unequal_packs_are_those_of_one_process(reports: Reports, case: str) -> None:
    tolerance = 1e-6 if "fp32" in case else 2e-2
    for report in reports[case]:
        assert report["gradient_error"] < tolerance
        assert report["norm_error"] < 10 * tolerance


@pytest.mark.parametrize("case", CASES)
def test_weights_and_average_put_together_from_the_ranks_are_those_of_one_process(reports: Reports, case: str) -> None:
    tolerance = 1e-6 if "fp32" in case else 5e-2
    for report in reports[case]:
        assert report["weight_error"] < tolerance
        assert report["average_error"] < tolerance
        assert sum(report["shares"]) == PARAMETERS
        assert max(report["shares"]) < 0.6 * PARAMETERS


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_is_dropped_on_all_ranks(reports: Reports, case: str) -> None:
    assert [report["poisoned"] for report in reports[case]] == [[False, False]] * 2


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_goes_on_bit_by_bit(reports: Reports, case: str) -> None:
    for report in reports[case]:
        assert report["resumed"] == report["unbroken"]


def test_gradients_with_activation_checkpointing_are_those_of_one_process(folder: Path) -> None:
    for rank in (0, 1):
        report = json.loads((folder / f"checkpointing-{rank}.json").read_text())
        assert set(report) == {"1-1", "2-2", "3-1"}
        assert max(report.values()) < 1e-6, report


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_where_two_have_been_also_under_another_stage(reports: Reports, folder: Path, alone: Ranks, case: str) -> None:
    norms = engine_worker.resume(alone, checkpoint.find(folder / case).folder, ELSEWHERE[case])
    assert norms == pytest.approx(reports[case][0]["unbroken"], rel=1e-5 if "fp32" in case else 2e-2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_adam_for_offloading_does_what_torchs_does(tmp_path: Path, stage: int) -> None:
    """The first use compiles it, which takes minutes."""
    case = f"{stage}-fp32-adamw-cpuadam"
    jobs.run_ranks("tests.distributed.engine_worker", str(tmp_path), case, log=tmp_path / "log")
    for rank in (0, 1):
        report = json.loads((tmp_path / f"{case}-{rank}.json").read_text())
        assert report["gradient_error"] < 1e-6
        assert report["weight_error"] < 1e-6
        assert report["average_error"] < 1e-6
        assert report["poisoned"] == [False, False]
        assert report["resumed"] == pytest.approx(report["unbroken"], rel=1e-6)
