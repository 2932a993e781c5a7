"""The estimate of a step's memory against the bytes of tensors in real steps of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.estimate.estimate import Situation, setting_of, work_of
from launch.hardware.devices import find_device
from tests.distributed import jobs, memory_worker

RANKS = 2
SHORT = ["3-none-fp32-adamw"]
LONG = [f"{stage}-{checkpointing}-fp32-adamw" for stage in range(4) for checkpointing in ("none", "full")]
HALF = [f"{stage}-{checkpointing}-bf16-adamw" for stage in (1, 3) for checkpointing in ("none", "full")]  # slow on CPUs: smaller packs


def compare(folder: Path, cases: list[str], *, images: int) -> dict[str, tuple[float, float]]:
    """Estimated and measured peak of each case, in MB."""
    jobs.run_ranks("tests.distributed.memory_worker", str(folder), str(images), *cases, log=folder / "log", ranks=RANKS)
    situation = Situation(ranks=RANKS, device=find_device("3060"))
    peaks = {}
    for case in cases:
        reports = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(RANKS)]
        assert all(report.pop("equal averages") for report in reports), "averages in host memory are not those on the device"
        config = memory_worker.config_of(case, images=images)
        expected = setting_of(config, situation, work=work_of(config, situation)).memory
        measured = max(max(report.values()) for report in reports)
        peaks[case] = expected.peak / 1e6, measured / 1e6
    return peaks


def check(peaks: dict[str, tuple[float, float]]) -> None:
    table = "\n".join(
        f"{case}: {expected:.1f} MB estimated, {measured:.1f} measured, {expected / measured - 1:+.1%}"
        for case, (expected, measured) in peaks.items()
    )
    print(table)
    assert all(abs(expected / measured - 1) < 0.15 for expected, measured in peaks.values()), table


def test_estimated_peaks_are_the_measured_ones(tmp_path: Path) -> None:
    check(compare(tmp_path, SHORT, images=2))


@pytest.mark.soak
def test_estimated_peaks_of_all_stages(tmp_path: Path) -> None:
    check(compare(tmp_path, [*LONG, "2-none-fp32-muon", "2-none-fp32-adamw8bit"], images=4))


@pytest.mark.soak
def test_estimated_peaks_in_half_precision(tmp_path: Path) -> None:
    check(compare(tmp_path, HALF, images=2))
