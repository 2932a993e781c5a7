"""`tim demo` in a process of its own, on fewer images, with a training too short to draw anything."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import main
from launch.demo import READ_ON, SIZES, STEPS
from tests import REPOSITORY
from tests.distributed import jobs

PICTURES = 400  # instead of 3,000


def test_the_demo_prepares_trains_draws_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = f"from launch import cli, demo; demo.IMAGES, demo.PROMPTS_SCORED = {PICTURES}, 10; cli.main()"
    command = [sys.executable, "-c", smaller, "demo", "--steps", "6", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "[WARNING]" not in done.stderr  # DeepSpeed's log
    training = done.stderr.partition("\n3/4 train")[2].partition("\n4/4 sample")[0].partition("\n")[2]
    assert training
    assert jobs.foreign_lines(training) == []
    result = json.loads(done.stdout)
    assert [row["steps"] for row in result["scores"]] == list(STEPS)
    assert all(0 <= row["all"] <= min(row["shape"], row["colours"]) <= 1 for row in result["scores"])
    assert result["fill"] > 0.9
    assert json.loads((tmp_path / "demo" / "corpus" / "manifest.json").read_text())["totals"]["kept"] > 0.99 * PICTURES
    with Image.open(tmp_path / result["files"]["grid"]) as grid:
        assert grid.height > 2 * sum(height for height, _ in SIZES)
        assert len(grid.convert("RGB").getcolors(1 << 20) or []) > 1000
    for name in ("loss", "model"):
        assert (tmp_path / result["files"][name]).exists()

    assert shlex.split(result["serve"])[3:] == ["serve", result["files"]["model"]]
    monkeypatch.chdir(tmp_path)
    python, _, module, *arguments = shlex.split(result["next"])
    assert (python, module) == (sys.executable, "launch.cli")
    assert main(arguments) == 0
    assert len(list((tmp_path / "demo" / "samples").glob("*.png"))) > 4  # two sizes in two numbers of steps, and the grid


def test_the_demo_says_where_to_read_on() -> None:
    assert f"\n## {READ_ON}\n" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
