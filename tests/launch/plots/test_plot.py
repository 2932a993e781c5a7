"""`tim plot` on rows as runs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from launch.plots.curves import read_curves, smoothed


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs: one was resumed after step 40 and has validations; the other was written by a version without these columns."""
    generator = np.random.default_rng(0)
    for name, steps in (("first", 100), ("second", 60)):
        rows = []
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "loss": 1 / step + generator.normal(0, 0.05),
                "loss_consistency": None,
                "images": 8 * step,
                "seconds": 36.0 * step,
            }
            if name == "first":
                row |= {"restarts": int(step > 40)}
                row |= {"validation_loss": 1 / step, "validation_loss_ema": 0.9 / step} if step % 20 == 0 else {}
            rows.append(json.dumps({**row, "first_ids": ["corpus/1"]}))
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows) + '{"step": 10')  # the power went
    return [tmp_path / "first", tmp_path / "second"]


def plot(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["plot", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_runs_are_compared_with_validations_and_restarts(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "loss.png"
    first, second = plot(*runs, "--x", "hours", "--out", out, capsys=capsys)["curves"]
    assert (first["run"], first["column"], first["points"], second["points"]) == ("first", "loss", 100, 60)
    assert first["restarts"] == [0.4]
    assert first["validation"] == {"weights": {"points": 5, "last": 0.01}, "EMA": {"points": 5, "last": 0.9 / 100}}
    assert (second["restarts"], second["validation"]) == ([], {})
    picture = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
        assert (picture == colour).all(axis=1).sum() > 100


def test_a_panel_for_each_column(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plot(runs[0], "--out", one, capsys=capsys)
    found = plot(runs[0], "--what", "loss,validation_loss_ema", "--x", "images", "--out", two, capsys=capsys)
    assert [curve["points"] for curve in found["curves"]] == [100, 5]
    assert found["curves"][0]["restarts"] == [320.0]
    assert Image.open(two).height > 1.5 * Image.open(one).height


def test_what_there_is_not_is_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--what los: no run has numbers in such a column; there are: images, loss, restarts, seconds, step,"
    ):
        read_curves(runs, columns=["los"], axis="step")
    with pytest.raises(ValueError, match=r"--what loss_consistency: no run has numbers"):
        read_curves(runs, columns=["loss_consistency"], axis="step")
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl; give the run_dir"):
        read_curves([tmp_path], columns=["loss"], axis="step")


def test_runs_of_the_same_name_are_told_apart(runs: list[Path]) -> None:
    same = runs[0] / "second"
    runs[1].rename(same)
    same.joinpath("metrics.jsonl").rename(same / "kept.jsonl")
    (same / "second").mkdir()
    for folder in (same, same / "second"):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    curves = read_curves([same, same / "second"], columns=["loss"], axis="step")["loss"]
    assert [curve.run for curve in curves] == [str(same), str(same / "second")]


def test_smoothing_does_not_lag_behind_a_line() -> None:
    line = [0.5 * k for k in range(300)]
    assert smoothed(line)[50:-50] == pytest.approx(line[50:-50])
    assert smoothed([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    noise = np.random.default_rng(0).normal(size=600)
    assert np.std(smoothed(noise.tolist())) < 0.3
