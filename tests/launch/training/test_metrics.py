from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.training.metrics import Meter, MetricsWriter, StepMeasure, read_rows


def measure(step: int) -> StepMeasure:
    return StepMeasure(
        ids=(f"c/{step}", f"c/{step + 1}"),
        raw=(0.1 * step, 0.0, 0.3),
        raw_images=(1, 0, 1),
        grad_norm=1.5 * step,
        applied=step != 3,
        lr=1e-3,
        images=2,
        failed=step == 4,
        tokens=10 * step,
        fill=0.9,
    )


def rows(meter: Meter, steps: range, *, every: int) -> list[dict[str, object]]:
    written = []
    for step in steps:
        meter.add(measure(step))
        if step % every == 0:
            written.append(meter.row(step, measure(step)))
    return written


def without_clock(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if "second" not in key}


def test_a_row_adds_up() -> None:
    row = rows(Meter(), range(1, 5), every=4)[0]
    assert row["loss"] == pytest.approx((0.1 * (1 + 2 + 3 + 4) + 4 * 0.3) / 8)
    assert row["loss_diffusion"] == pytest.approx(0.25)
    assert row["loss_consistency"] is None
    assert row["loss_transition"] == pytest.approx(0.3)
    assert (row["images"], row["tokens"], row["failed"], row["skipped_steps"]) == (8, 100, 1, 1)
    assert row["grad_norm"] == pytest.approx(1.5 * 2.5)
    assert row["first_ids"] == ["c/4", "c/5"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_null(tmp_path: Path, bad: float) -> None:
    meter = Meter()
    last = replace(measure(1), raw=(0.1, 0.0, bad), grad_norm=bad, alignment=bad, binned=[bad] * len(measure(1).binned))
    meter.add(last)
    row = meter.row(1, last)
    assert row["loss_diffusion"] == 0.1
    assert [row[name] for name in ("loss", "loss_transition", "loss_alignment", "grad_norm", "loss_t_0_20")] == [None] * 5
    json.dumps(row, allow_nan=False)
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps({'step': 1, 'loss': bad})}\n")  # by an older version
    with MetricsWriter(tmp_path, step=1) as writer:
        writer.write({**row, "step": 2})
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [None, None]
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1, "loss": null}\n')


def test_steps_without_images_have_no_loss() -> None:
    meter = Meter()
    last = replace(measure(1), raw=(0.0,) * 3, raw_images=(0,) * 3, alignment=0.0)
    meter.add(last)
    row = meter.row(1, last)
    assert (row["loss"], row["loss_diffusion"], row["loss_alignment"]) == (None, None, None)


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_meter_that_was_saved_in_the_middle_of_a_row_goes_on(stop: int) -> None:
    whole = rows(Meter(), range(1, 10), every=3)
    first, second = Meter(), Meter()
    before = rows(first, range(1, stop + 1), every=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = rows(second, range(stop + 1, 10), every=3)
    assert [without_clock(row) for row in [*before, *after]] == [without_clock(row) for row in whole]


def test_a_meter_of_an_older_checkpoint_goes_on() -> None:
    meter, resumed = Meter(), Meter()
    rows(meter, range(1, 3), every=3)
    state = json.loads(json.dumps(meter.state_dict()))
    del state["sections"], state["since"]["binned"], state["since"]["flops"]
    resumed.load_state_dict(state)
    (row,) = rows(resumed, range(3, 4), every=3)
    assert without_clock(row) == without_clock(rows(Meter(), range(1, 4), every=3)[0])


def test_the_digest_knows_the_order() -> None:
    one, other = Meter(), Meter()
    for step in (1, 2):
        one.add(measure(step))
    for step in (2, 1):
        other.add(measure(step))
    assert one.row(2, measure(2))["ids_digest"] != other.row(2, measure(2))["ids_digest"]


def test_rows_that_an_interrupted_run_wrote_ahead_are_taken_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, step=0) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the power went
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    with MetricsWriter(tmp_path, step=2) as writer:
        assert writer.ahead == 3
        writer.write({"step": 3, "loss": 0.25})
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_columns_are_added_to_the_last_row(tmp_path: Path) -> None:
    path, told = tmp_path / "metrics.jsonl", []
    with MetricsWriter(tmp_path, step=0) as writer:
        writer.listeners.append(told.append)
        writer.write({"step": 1, "loss": 0.5})
        writer.write({"step": 2, "seconds_validation": 0.0, "first_ids": ["é"]})
        writer.add_to_last({"validation_loss": 0.25, "seconds_validation": 1.5})
        complete = {"step": 2, "seconds_validation": 1.5, "first_ids": ["é"], "validation_loss": 0.25}
        assert read_rows(path) == [{"step": 1, "loss": 0.5}, complete]
        writer.write({"step": 3})
    with MetricsWriter(tmp_path, step=2) as writer:
        assert writer.last == complete
        writer.add_to_last({"other": 1})
        writer.write({"step": 3})
    assert read_rows(path) == [{"step": 1, "loss": 0.5}, {**complete, "other": 1}, {"step": 3}]
    assert told[2] == {"step": 2, "validation_loss": 0.25, "seconds_validation": 1.5}
