"""The progress line of a training."""

from __future__ import annotations

import pytest

from launch.logs.progress_line import ProgressLine


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"loss": 0.5, "images_per_second": 12.0, "tokens_per_second": 3400.0, "fill": 0.97}
    with ProgressLine(steps=3, done=0, quiet=False) as progress:
        progress.log("hello")
        for step in (1, 2, 3):
            progress.show(step, row)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "hello"
    assert lines[1].startswith("step 1/3 · loss 0.5000 · 12.0 images/s · 3,400 tokens/s · fill 97.0%")
    assert lines[-1].startswith("step 3/3")
    with ProgressLine(steps=3, done=0, quiet=True) as progress:
        progress.log("hello")
        progress.show(1, row)
    assert capsys.readouterr().err == ""


def test_what_is_not_finite_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"loss": None, "images_per_second": 12.0, "tokens_per_second": 3400.0, "fill": 0.97}
    validated = {"validation_images": 7, "validation_loss": None, "validation_loss_ema": 0.5}
    with ProgressLine(steps=2, done=0, quiet=False) as progress:
        progress.show(1, {**row, **validated})
        progress.show(2, {**row, "validation_images": 0, "validation_loss": None, "validation_loss_ema": None})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/2 · loss not finite · validation not finite (EMA 0.5000) · 12.0 images/s")
    assert second.startswith("step 2/2 · loss not finite · validation without images · ")
