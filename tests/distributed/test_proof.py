"""`tim bench objective`: what it measures, the command as it is typed, and in `make soak` its claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.synthetic import figures, random_view
from launch.benchmarks import objective
from launch.benchmarks.objective import BASELINE, OBJECTIVES, SCORES, describe_comparison, differences, energy_distance, scores
from launch.cli import main
from launch.config.load import load_config
from launch.demo import RECIPE
from launch.training.train import train


def test_the_energy_distance_is_zero_for_one_distribution_and_grows_with_what_parts_two() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400, 5))
    assert abs(energy_distance(a, b)) < 0.02
    assert 0.05 < energy_distance(a, b + 0.5) < energy_distance(a, b + 1)
    assert energy_distance(a, 0.5 * b) > 0.05


def test_differences_are_paired_and_have_intervals() -> None:
    rng = np.random.default_rng(0)
    prompts, noise = rng.normal(size=400), rng.normal(size=(2, 400))
    mean, half = differences({"ground": prompts + 0.1 * noise[0] + 0.05}, {"ground": prompts + 0.1 * noise[1]})["ground"]
    assert mean == pytest.approx(0.05, abs=half)
    assert half == pytest.approx(1.96 * 0.1 * 2**0.5 / 20, rel=0.1), "what the prompts share cancels"


def test_the_mean_of_all_images_of_a_prompt_has_the_colours_but_no_speckles() -> None:
    rng, asked = np.random.default_rng(0), figures(["circle"])

    def views() -> list[Image.Image]:
        return [random_view(figure, height=32, width=40, rng=rng, speckled=True) for figure in asked]

    many = [views() for _ in range(24)]
    means = [Image.fromarray(np.mean([np.asarray(view[i]) for view in many], axis=0).astype(np.uint8)) for i in range(len(asked))]
    real, mean = scores(many[0], real=many[1], requested=asked), scores(means, real=many[1], requested=asked)
    assert real["colours"] > 0.95
    assert real["speckled"] == 1
    assert abs(real["ground"]) < 0.02
    assert abs(real["image"]) < 0.02
    assert mean["colours"] > 0.95
    assert mean["speckled"] == mean["both"] == 0
    assert mean["ground"] > 0.1
    assert mean["image"] > 0.04


def test_every_objective_trains_and_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(overrides: Sequence[str]) -> None:
        train(load_config(RECIPE, overrides=overrides), quiet=True)

    monkeypatch.setattr(objective, "train", in_this_process)  # the demo's, which starts two interpreters each time
    monkeypatch.setattr(objective, "STEPS", (1, 2))
    assert main(["bench", "objective", "--out", str(tmp_path / "proof"), "--steps", "2", "--images", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["scores"]) == list(OBJECTIVES)
    for name in OBJECTIVES:
        assert list(found["scores"][name]) == ["1", "2"]
    assert found["real"]["speckled"] == 1
    assert found["scores"]["flow matching"]["1"]["both"] == 0
    assert list(found["differences"]) == [name for name in OBJECTIVES if name != BASELINE]
    for name, row in found["differences"].items():
        for count, key in product(("1", "2"), SCORES):
            difference = found["scores"][name][count][key] - found["scores"][BASELINE][count][key]
            assert row[count][key] == pytest.approx([difference, abs(row[count][key][1])], abs=1e-9)
    written = describe_comparison({**found, "scores": {name: {int(k): v for k, v in row.items()} for name, row in found["scores"].items()}})
    assert all(name in written for name in OBJECTIVES)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_transition_model_is_ahead_of_flow_matching_in_one_step(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "bench", "objective", "--out", str(tmp_path / "proof"), "--steps", "400", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)["scores"]
    flow = found.pop("flow matching")
    for name, row in found.items():
        assert row["1"]["speckled"] > flow["1"]["speckled"] + 0.3, name
        assert row["1"]["ground"] < 0.8 * flow["1"]["ground"], name
