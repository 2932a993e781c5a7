"""Two real ranks under each ZeRO stage do what one process does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed import jobs

CASES = ("1-fp32-adamw", "2-fp32-adamw", "3-fp32-adamw", "2-bf16-adamw", "1-fp32-muon", "2-fp32-muon")
PARAMETERS = 7 * 33 + 33 + 33 * 33 + 33 + 33 * 20 + 20 + 20 * 5


Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """By case, what each rank measured."""
    folder = tmp_path_factory.mktemp("engine")
    jobs.run_ranks("tests.distributed.engine_worker", str(folder), *CASES)
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
