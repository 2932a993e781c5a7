"""Which checkpoints are evaluated, and what becomes of the results. tests/distributed/test_evaluations.py has a whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints.evaluation_results import columns, evaluation_folder, read_results, table
from launch.config.run_sections import EvalConfig
from launch.evaluating.evaluations import Evaluations
from launch.evaluating.process import main
from launch.trackers.backends import TensorBoard
from launch.training.metrics import MetricsWriter, last_row, read_rows

ROW = {"metric": "frechet", "features": "pixels", "steps": 4, "guidance": 2.5, "bin": "all", "better": "lower", "images": 8}
FOUR = {**ROW, "value": 12.345, "low": 11.0, "high": 13.5}
ONE = {**ROW, "steps": 1, "value": 20.0, "low": 18.0, "high": 22.0}


def evaluated(run: Path, step: int, *rows: dict[str, Any]) -> Path:
    """A folder as a finished evaluation leaves it."""
    folder = evaluation_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps({"step": step, "images": 8 * step, "seconds": 2.0 * step, "restarts": 0}))
    (folder / "eval.json").write_text(json.dumps({"format": 1, "rows": [*rows, {**FOUR, "bin": "size 1", "value": 99.0}]}))
    return folder


def checkpoint(run: Path, step: int) -> Path:
    """A checkpoint without weights: its evaluation fails."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text(json.dumps({"meter": {"total": {"images": 8}, "seconds": 1.0}}))
    return folder


def evaluations(run: Path, said: list[str]) -> Evaluations:
    return Evaluations(run, EvalConfig(every=2), corpus="corpus", device="cpu", steps=5, log=said.append)


def test_rows_of_all_images_become_columns_and_a_table(tmp_path: Path) -> None:
    rows = read_results(evaluated(tmp_path, 4, ONE, FOUR))
    assert columns(rows) == {"eval/frechet_pixels/steps1": 20.0, "eval/frechet_pixels/steps4": 12.345}
    assert columns([FOUR, {**FOUR, "guidance": 1.0}]).keys() == {
        "eval/frechet_pixels/steps4-cfg2.5",
        "eval/frechet_pixels/steps4-cfg1",
    }
    assert columns([{**FOUR, "metric": "clip_score", "features": ""}]) == {"eval/clip_score/steps4": 12.345}
    assert table(rows) == [
        "| metric | 1 step | 4 steps |",
        "| --- | --- | --- |",
        "| frechet (pixels), lower is better | 20 [18, 22] | 12.35 [11, 13.5] |",
    ]
    (tmp_path / "broken").mkdir()
    lacking = json.dumps({"rows": [{**FOUR, "value": None}, {**FOUR, "low": float("nan")}, {**FOUR, "images": "8"}]})
    for text in ("", "[]", '{"rows": 3}', '{"rows": [3]}', lacking):
        (tmp_path / "broken" / "eval.json").write_text(text)
        assert read_results(tmp_path / "broken") == []


def test_a_resumed_run_takes_up_what_is_finished_and_forgets_later_steps(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        evaluated(tmp_path, step, FOUR)
    checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6)
    with evaluations(tmp_path, []) as found:
        found.resume(4, logged={2})
        (row,) = found.finished()
        assert found.in_progress is None
    assert row == {"step": 4, "images": 32, "seconds": 8.0, "restarts": 0, "eval/step": 4, "eval/frechet_pixels/steps4": 12.345}
    assert not evaluation_folder(tmp_path, 6).exists()


def test_columns_have_names_that_all_trackers_take() -> None:
    for features in ("Inception v3 (weights-inception-2015-12-05-6726825d.pth)", "open_clip ViT-L/14", "dinov2 (größe: 1)"):
        (name,) = columns([{**FOUR, "features": features}])
        assert re.fullmatch(r"[A-Za-z0-9_.\-/]+", name), "MLflow refuses others"
        assert name.count("/") == 2
    assert list(columns([{**FOUR, "metric": "fid", "features": "Inception v3 (a.pth)"}])) == ["eval/fid_Inception-v3-a.pth/steps4"]


def test_evaluations_that_a_run_has_lost_are_said(tmp_path: Path) -> None:
    evaluated(tmp_path, 2, FOUR)
    (evaluation_folder(tmp_path, 4)).mkdir()  # killed
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    evaluated(tmp_path, 8, FOUR)
    (tmp_path / "evaluations" / "step-000002 copy").mkdir()
    said: list[str] = []
    with evaluations(tmp_path, said) as found:
        found.resume(8, logged={2, 8})
        assert found.in_progress is None
        found.finished()
    assert said == ["steps 4, 6: not evaluated, the run ended before; only the newest checkpoint's evaluation is repeated"]


def test_the_model_of_the_clip_score_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> None:
        started.append(command)
        raise OSError("not started")

    monkeypatch.setattr("launch.evaluating.evaluations.subprocess.Popen", start)
    section = EvalConfig(every=2, clip="open_clip=c", metrics=("clip_score",))
    with Evaluations(tmp_path, section, corpus="corpus", device="cpu", steps=5, log=print) as found:
        found.add(checkpoint(tmp_path, 2))
        assert found.wait(60)
    (command,) = started
    assert command[command.index("--clip") + 1] == "open_clip=c"
    assert command[command.index("--metrics") + 1] == "clip_score"


def test_a_failed_evaluation_is_one_line_and_the_next_one_runs(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "config.yaml").write_text("not: a config\n")
    folder = checkpoint(tmp_path, 2)
    with evaluations(tmp_path, said) as found:
        found.add(checkpoint(tmp_path, 3))  # not due
        assert found.in_progress is None
        found.add(folder)
        assert found.uses(folder)
        assert found.wait(600)
        assert not found.uses(folder)
        assert found.finished() == []
    (line,) = said
    assert line.startswith("warning: the evaluation of step 2 failed (")
    assert line.endswith(f"see {evaluation_folder(tmp_path, 2) / 'log.txt'}")


def test_the_process_ends_with_another_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("launch.evaluating.process.os._exit", ended)
    monkeypatch.setattr("launch.evaluating.process.sys.platform", "other")  # or pytest would die with its parent
    with pytest.raises(SystemExit, match="1"):
        main(["0", "run", "2", "model"])


def test_late_rows_in_the_metrics(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    late = {"step": 2, "eval/step": 2, "eval/x": 1.0}
    with MetricsWriter(tmp_path, step=0) as writer:
        writer.listeners.append(told.append)
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 0.5})
        writer.write_evaluation(late)
        writer.write({"step": 4, "loss": 0.25})
        writer.add_to_last({"validation_loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 2, 4]
    assert told[3] == late
    assert last_row(path) == {"step": 4, "loss": 0.25, "validation_loss": 1.0}
    with MetricsWriter(tmp_path, step=2) as writer:
        assert (writer.ahead, writer.evaluated, writer.last) == (4, {2}, {"step": 2, "loss": 0.5})
        writer.add_to_last({"validation_loss": 2.0})
    assert read_rows(path) == [{"step": 1, "loss": 0.5}, late, {"step": 2, "loss": 0.5, "validation_loss": 2.0}]
    with MetricsWriter(tmp_path, step=1) as writer:
        assert writer.evaluated == set()


def test_tensorboard_has_an_evaluation_at_its_own_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backend = TensorBoard(tmp_path, step=0)
    backend.start({})
    backend.write({"loss": 1.0}, step=3)
    backend.write({"eval/frechet_pixels/steps4": 12.5}, step=2)
    backend.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("eval/frechet_pixels/steps4")
    assert (event.step, event.value) == (2, 12.5)
