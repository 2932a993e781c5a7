"""`tim bench derivative` and `precision`: errors of half precision, of a network with random weights and of a model."""

from __future__ import annotations

import json

import pytest

from launch.benchmarks.derivative import describe_derivative
from launch.cli import main
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim.model_folder.folder import save_model
from tim.objective import EPSILONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, tiny_network().state_dict(), SPEC)
    return str(folder)


def test_errors_of_the_derivative(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--depth", "1", "--images", "2", "--max-tokens", "8", "--epsilon", "0.04"]
    assert main(["bench", "derivative", *small, "--model", model, "--prompt", "a", "--prompt", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(network["weights"], network["depth"]) for network in found["networks"]] == [("random", 1), ("trained", 2)]
    assert (found["images"], found["defaults"]) == (2, EPSILONS)
    assert 4 <= found["largest"] <= 8
    for network in found["networks"]:
        errors = network["errors"]
        assert list(errors) == ["all", "0 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 to 1"]
        assert list(errors["all"]["fp16"]) == ["0.005", "0.02", "0.04", "0.05"]
        exact, noisy, noisier = (errors["all"][dtype]["0.005"] for dtype in ("fp32", "fp16", "bf16"))
        assert 0 < 10 * exact < noisy < noisier / 4, "rounding"
        middle = errors["0.4 to 0.6"]["fp32"]
        assert 2.5 < middle["0.04"] / middle["0.02"] < 5, "truncation, of second order in epsilon"
        assert network["repeated"] == 0
    written = describe_derivative(found)
    assert "trained weights, 2 blocks" in written
    assert "--model" not in written


def test_without_a_model_the_table_says_that_weights_are_random(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "derivative", "--depth", "1", "--images", "1", "--max-tokens", "4"]) == 0
    written = capsys.readouterr().out
    assert written.endswith("Random weights only: give a trained network with --model.\n")
    assert written.count("*") == 4, "the default epsilon of each dtype is marked"
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "derivative", "--prompt", "a"])
    assert "--prompt: requires --model MODEL" in capsys.readouterr().err


def test_levels_between_images_of_two_precisions(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "precision", model, "--prompt", "a", "--prompt", "", "--size", "16x16,32x8", "--steps", "1,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["default"]) == (4, "fp16" if found["device"] == "cuda" else "fp32")
    for count in ("1 step", "2 steps"):
        near, far = found["fp16"][count], found["bf16"][count]
        assert 0 < near["mean"] < far["mean"] < 2
        assert near["percentile_99"] <= near["maximum"] < 5
