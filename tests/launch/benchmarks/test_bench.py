"""`tim bench`: that its other ways to run the network compute the same, and that each measurement says what it promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from launch.benchmarks.compiled import full_packs
from launch.benchmarks.cost_fit import fit_gamma
from launch.benchmarks.network import grids_of
from launch.benchmarks.padded_network import DenseNetwork
from launch.cli import main
from pipeline.planning.planner import PlanConfig
from tests.isolation import isolated_process
from tests.tim.tiny import tiny_network
from tim import PackedText, PackedTokens

SMALL = ["--width", "64", "--max-tokens", "16", "--batch", "4", "--repeats", "1"]


@pytest.mark.parametrize("sizes", [[(4, 4), (2, 8), (12, 4)], [(4, 6)] * 3], ids=["padded", "one bucket"])
def test_dense_batches_compute_what_packs_compute(sizes: list[tuple[int, int]]) -> None:
    network = tiny_network().double()
    packed = PackedTokens.from_latents([torch.randn(3, h, w).double() for h, w in sizes], 2)
    text = PackedText.from_features([torch.randn(m, 16).double() for m in (3, 1, 5)])
    t = torch.rand(len(sizes)).double()
    gradients = []
    for way in (network, DenseNetwork(network)):
        out = way(packed, t, t / 2, text).tokens
        gradients.append((out, *torch.autograd.grad(out.square().sum(), list(network.parameters()))))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_sizes_come_from_headers_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (100, 50)).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert sorted(grids_of([tmp_path], max_tokens=1024)) == [(3, 6), (4, 2)]
    assert sorted(grids_of([tmp_path, tmp_path], max_tokens=1024)) == [(3, 6), (3, 6), (4, 2), (4, 2)]
    assert len(grids_of([], max_tokens=1024)) == 400


@pytest.fixture
def isolated() -> Iterator[None]:
    with isolated_process():
        yield


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["bench", *arguments, *SMALL, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("isolated")
def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "step", "--depth", "1")
    assert found["images"] == 4
    assert set(found["images_per_second"]) == {"packed", "padded", "buckets"}
    assert found["ideal_padded_over_packed"] > 1
    assert found["share_of_ideal"] == pytest.approx(found["padded_over_packed"] / found["ideal_padded_over_packed"])
    assert min(found["derivative_over_forward_backward"], found["share_of_matmul_rate"], found["buckets_over_packed"]) > 0
    overheads = found["training_step"]
    assert overheads["images"] == 1
    assert set(overheads["over_bare"]) == {"bare again", "average (EMA)", "guards", "logging", "heartbeat", "all of these"}
    assert min(*overheads["over_bare"].values(), *overheads["cpu_over_bare"].values()) > 0
    logging = overheads["logging"]
    assert min(logging["cpu_seconds_per_step"], logging["cpu_seconds_per_row"]) > 0
    assert logging["share_of_step"]["row_in_every_step"] > logging["share_of_step"]["row_at_default"] > 0
    assert overheads["save"]["steps_meanwhile"] >= 1


@pytest.mark.usefixtures("isolated")
def test_muon_beside_deepspeeds(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "step", "--depth", "1", "--muon")
    names = {"ours", "DeepSpeed's", "DeepSpeed's, clipped"}
    assert set(found["seconds_per_step"]) == set(found["state_bytes"]) == names
    after = found["error_after"]
    assert after["ours"] < found["error_before"]["ours"]
    assert after["DeepSpeed's"] == pytest.approx(after["ours"], rel=0.01)  # the same steps


def test_compiled_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # Inductor takes minutes
    torch.compiler.reset()
    found = report(capsys, "step", "--compiled", "--depth", "1")
    assert set(found["images_per_second"]) == {"not compiled", "norms and MLPs", "blocks"}
    assert set(found["speed_up"]) == set(found["compile_seconds"]) == {"norms and MLPs", "blocks"}
    assert 0.5 < found["fill"] <= 1


def test_full_packs() -> None:
    assert full_packs([(4, 4), (2, 2), (4, 4), (1, 3), (3, 3)], tokens=20, packs=3) == [[(4, 4), (2, 2)], [(4, 4), (1, 3)], [(3, 3)]]


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "attention")
    assert {"sdpa forward", "sdpa with backward", "padded forward", "image by image with backward"} <= set(found["seconds"])
    if found["device"].startswith("CPU"):
        assert set(found["impossible"]) == {"varlen", "flash", "flex"}


def test_sample(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "sample", "--depth", "1", "--steps", "1")
    assert set(found["images_per_second"]) == {"packed", "padded", "buckets"}


def test_index(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "index", "--samples", "20", "--rows", "50000", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["indexed_per_second"]) == 4
    assert min(*found["indexed_per_second"].values(), found["50,000_rows"]["seconds_to_first_step"]) > 0


def test_a_folder_without_images_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "step", str(tmp_path)])
    assert "no images: give a corpus or a folder of images" in capsys.readouterr().err


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plan", "--steps", "2", "--ranks", "16", "--rows", "40000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for mix in ("web", "high-resolution", "two humps"):
        planner, *others = (figures for figures in found[mix].values() if isinstance(figures, dict))
        assert len(others) == 3
        assert planner["fill"] > 0.93
        for mode in ("utilisation", "utilisation_lockstep"):
            assert planner[mode] > 0.95
            assert planner[mode] > max(other[mode] for other in others)
    assert found["resume"]["rows"] == 40_000
    assert found["resume"]["images_of_a_rank"] > 0


def test_the_fit_finds_what_the_times_follow() -> None:
    lengths = np.array([64.0, 256, 1024, 4096])
    for gamma in (0.0, 0.4, 3.0):
        found, error = fit_gamma(lengths, per_token=1e-6 * (1 + gamma * lengths / (6 * 384)), width=384)
        assert found == pytest.approx(gamma, abs=1e-9)
        assert error < 1e-9
    assert fit_gamma(lengths, per_token=1e-6 / (1 + lengths), width=384)[0] == 0  # longer is not cheaper: that was noise


def test_fitting_the_cost_model_prints_lines_for_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "64", "--max-tokens", "256", "--batch", "2", "--repeats", "1"]
    assert main(["bench", "attention", "--fit", *small]) == 0
    plan = PlanConfig(**yaml.safe_load(capsys.readouterr().out)["plan"])
    assert plan.gamma >= 0
    assert plan.cost_factors[0] == 1 < sum(plan.cost_factors)
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "attention", "--fit", *SMALL])
    assert "--max-tokens 16" in capsys.readouterr().err
