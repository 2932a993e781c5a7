"""Equality with the published implementation, captions and classes: forward passes, projections, samples, losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tim import PackedText, PackedTokens, TransitionObjective, TransitionTransformer, sample, transports
from tim.packed import Condition

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A published network of one kind, and what it said."""

    params: dict[str, Any]
    weights: dict[str, Tensor]
    forward: dict[str, Tensor]
    schedule: dict[str, Tensor]

    def network(self, rope: str) -> TransitionTransformer:
        network = TransitionTransformer.from_official(self.params, rope=rope)
        network.load_official(self.weights)
        return network.eval()

    def condition(self, *given: Tensor) -> Condition:
        """What the golden files hold for images: (B, M, F) caption features or (B,) class ids."""
        return PackedText.from_features([row for rows in given for row in rows]) if "cap_feat_dim" in self.params else torch.cat(given)


@pytest.fixture(scope="module", params=["t2i", "c2i"])
def case(request: pytest.FixtureRequest, golden: Path) -> Case:
    params = json.loads((golden / "meta.json").read_text())[request.param]["config"]
    return Case(params, *(load_file(golden / f"{request.param}_{name}.safetensors") for name in ("weights", "forward", "schedule")))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_forward_and_projection_in_one_pack_of_all_shapes(case: Case) -> None:
    given = case.forward
    latents = [x for i in range(3) for x in given[f"{i}.x"]]
    condition = case.condition(*(given[f"{i}.y"] for i in range(3)))
    t, r = (torch.cat([given[f"{i}.{name}"] for i in range(3)]) for name in "tr")
    packed = PackedTokens.from_latents(latents, case.params["patch_size"])
    out, projection = case.network("legacy")(packed, t, r, condition, return_alignment=True)
    for actual, expected in zip(out.to_latents(), [x for i in range(3) for x in given[f"{i}.out"]], strict=True):
        assert relative_error(actual, expected) < TOLERANCE
    assert relative_error(projection, torch.cat([given[f"{i}.h_proj"].flatten(0, 1) for i in range(3)])) < TOLERANCE


@torch.no_grad()
def test_rowcol_layout_agrees_on_squares_only(case: Case) -> None:
    network, given = case.network("rowcol"), case.forward
    for i, agrees in enumerate((True, False, False)):
        packed = PackedTokens.from_latents(list(given[f"{i}.x"]), case.params["patch_size"])
        out = network(packed, given[f"{i}.t"], given[f"{i}.r"], case.condition(given[f"{i}.y"]))
        assert (relative_error(torch.stack(out.to_latents()), given[f"{i}.out"]) < TOLERANCE) == agrees


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "interval", "evaluations"),
    [("n1", 1, 1.0, (0.0, 1.0), 1), ("n4_cfg", 4, 2.5, (0.0, 0.999), 7), ("n8_int", 8, 1.75, (0.2, 0.7), 12)],
)
def test_samples(case: Case, name: str, steps: int, guidance: float, interval: tuple[float, float], evaluations: int) -> None:
    result = sample(
        case.network("legacy"),
        list(case.schedule["z"]),
        case.condition(case.schedule["y"]),
        transport=transports.make("ot_fm"),
        steps=steps,
        guidance=guidance,
        null_condition=case.condition(case.schedule["y_null"]),
        interval=interval,
    )
    assert relative_error(torch.stack(result.latents), case.schedule[f"sample.{name}"]) < TOLERANCE
    assert result.evaluations == [evaluations] * 4


def test_losses_and_derivative(case: Case) -> None:
    schedule, patch_size = case.schedule, case.params["patch_size"]
    network, condition, latents, noise = case.network("legacy"), case.condition(schedule["y"]), list(schedule["x0"]), list(schedule["z"])
    t, r = schedule["loss.t"].double(), schedule["loss.r"].double()
    objective = TransitionObjective(transports.make("ot_fm"), patch_size=patch_size, shift=None, alignment=0.5)
    teacher = schedule["loss.h_target"].flatten(0, 1)
    losses = objective.at_times(network, latents, condition, noise=noise, t=t, r=r, weights=torch.ones(4), teacher=teacher)
    proj = float(schedule["loss.dir.proj"])
    assert float(losses.raw.mean()) == pytest.approx(float(schedule["loss.dir.denoising"]), rel=TOLERANCE)
    assert float(losses.alignment.mean()) == pytest.approx(proj, rel=TOLERANCE)
    assert float(losses.loss.detach()) / 4 == pytest.approx(float(schedule["loss.dir.weighted"]) + 0.5 * proj, rel=TOLERANCE)

    clean, noise_tokens = PackedTokens.from_latents(latents, patch_size), PackedTokens.from_latents(noise, patch_size).tokens
    derivative, _ = objective.path_derivative(network, clean, noise_tokens, condition, t=t, r=r)
    t_tokens, r_tokens = clean.per_token(t)[:, None], clean.per_token(r)[:, None]
    target = objective.transport.target(clean.tokens, noise_tokens, t_tokens, r_tokens, derivative)
    for actual, name in ((derivative, "dF"), (target, "F_target")):
        assert relative_error(torch.stack(clean._replace(tokens=actual).to_latents()), schedule[f"loss.{name}"]) < TOLERANCE, name
