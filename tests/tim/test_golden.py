"""Equality with the published implementation: forward passes, projections, samples, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tim import PackedText, PackedTokens, TransitionObjective, TransitionTransformer, sample, transports

TOLERANCE = 1e-4


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def network(t2i_params: dict[str, Any], t2i_weights: dict[str, Tensor]) -> TransitionTransformer:
    network = TransitionTransformer.from_official(t2i_params, rope="legacy")
    network.load_official(t2i_weights)
    return network.eval()


@pytest.fixture(scope="module")
def schedule(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "t2i_schedule.safetensors")


@torch.no_grad()
def test_forward_and_projection_in_one_pack_of_all_shapes(network: TransitionTransformer, golden: Path) -> None:
    case = load_file(golden / "t2i_forward.safetensors")
    latents = [x for i in range(3) for x in case[f"{i}.x"]]
    text = PackedText.from_features([y for i in range(3) for y in case[f"{i}.y"]])
    t, r = (torch.cat([case[f"{i}.{name}"] for i in range(3)]) for name in "tr")
    out, projection = network(PackedTokens.from_latents(latents, 1), t, r, text, return_alignment=True)
    for actual, expected in zip(out.to_latents(), [x for i in range(3) for x in case[f"{i}.out"]], strict=True):
        assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(projection, torch.cat([case[f"{i}.h_proj"].flatten(0, 1) for i in range(3)])) < TOLERANCE


@torch.no_grad()
def test_rowcol_layout_agrees_on_squares_only(t2i_params: dict[str, Any], t2i_weights: dict[str, Tensor], golden: Path) -> None:
    network = TransitionTransformer.from_official(t2i_params, rope="rowcol")
    network.load_official(t2i_weights)
    case = load_file(golden / "t2i_forward.safetensors")
    for i, agrees in enumerate((True, False, False)):
        text = PackedText.from_features(list(case[f"{i}.y"]))
        out = network(PackedTokens.from_latents(list(case[f"{i}.x"]), 1), case[f"{i}.t"], case[f"{i}.r"], text)
        assert (relative_error(torch.stack(out.to_latents()), case[f"{i}.out"]) < TOLERANCE) == agrees


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "interval", "evaluations"),
    [("n1", 1, 1.0, (0.0, 1.0), 1), ("n4_cfg", 4, 2.5, (0.0, 0.999), 7), ("n8_int", 8, 1.75, (0.2, 0.7), 12)],
)
def test_samples(
    network: TransitionTransformer,
    schedule: dict[str, Tensor],
    name: str,
    steps: int,
    guidance: float,
    interval: tuple[float, float],
    evaluations: int,
) -> None:
    result = sample(
        network,
        list(schedule["z"]),
        PackedText.from_features(list(schedule["y"])),
        transport=transports.make("ot_fm"),
        steps=steps,
        guidance=guidance,
        null_condition=PackedText.from_features(list(schedule["y_null"])),
        interval=interval,
    )
    assert relative_error(torch.stack(result.latents), schedule[f"sample.{name}"]) < TOLERANCE
    assert result.evaluations == [evaluations] * 4


def test_losses_and_derivative(network: TransitionTransformer, schedule: dict[str, Tensor]) -> None:
    objective = TransitionObjective(transports.make("ot_fm"), patch_size=1, shift=None)
    losses = objective.at_times(
        network,
        list(schedule["x0"]),
        PackedText.from_features(list(schedule["y"])),
        noise=list(schedule["z"]),
        t=schedule["loss.t"].double(),
        r=schedule["loss.r"].double(),
        weights=torch.ones(4),
    )
    assert float(losses.raw.mean()) == pytest.approx(float(schedule["loss.dir.denoising"]), rel=TOLERANCE)
    assert float(losses.loss.detach()) / 4 == pytest.approx(float(schedule["loss.dir.weighted"]), rel=TOLERANCE)
