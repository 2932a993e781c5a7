"""Exact tiling of KL autoencoders: equal to diffusers' network on the whole image, within the memory that the plan predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import REPOSITORY
from tests.tim.models import autoencoder
from tim import codecs
from tim.codecs import kl_tiling
from tim.codecs.kl import PLANNED
from tim.codecs.kl_tiling import Plan, Shape, planner

diffusers = pytest.importorskip("diffusers")

NETWORKS: dict[str, dict[str, Any]] = {
    "attention": {},
    "no attention": {"mid_block_add_attention": False},
    "16 channels, no 1x1 convolutions": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "one level": {"block_out_channels": (8,)},
    "4 levels, 2 layers": {"block_out_channels": (4, 8, 8, 12), "layers_per_block": 2},
    "flux2": {"latent_channels": 8, "decoder_block_out_channels": (4, 8, 12)},
}


@cache
def network(name: str) -> Any:
    """An autoencoder with random weights and biases, so that every layer matters and seams would show."""
    settings = {"block_out_channels": (4, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2, **NETWORKS[name]}
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    torch.manual_seed(0)
    made = (diffusers.AutoencoderKLFlux2 if name == "flux2" else diffusers.AutoencoderKL)(**settings, **blocks).eval()
    for weight in made.parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5
        weight.data = torch.randn(weight.shape) * scale + (0.5 if weight.ndim == 1 else 0)
    return made.requires_grad_(False)


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that plans of tiny images have many tiles."""
    monkeypatch.setattr(planner, "OVERHEAD", 0)
    monkeypatch.setattr(planner, "SMALLEST_TILE", 7)


def assembled(plan: Plan, source: Tensor) -> Tensor:
    """The output of a plan. Every value comes once."""
    output, count = torch.zeros(plan.shapes[-1]), torch.zeros(plan.shapes[-1])
    for (rows, columns), values in kl_tiling.run(plan, source, device=torch.device("cpu")):
        output[:, slice(*rows), slice(*columns)] += values
        count[:, slice(*rows), slice(*columns)] += 1
    assert bool((count == 1).all())
    return output


def plans(steps: tuple[Any, ...], source: Tensor) -> list[Plan]:
    """For the whole image and for two limits below what it needs."""
    whole = kl_tiling.plan(steps, Shape(*source.shape), memory=float("inf"))
    assert len(whole.passes) == 1
    return [whole, *(kl_tiling.plan(steps, Shape(*source.shape), memory=whole.peak * share) for share in (0.7, 0.4))]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(7, 10), (9, 4), (1, 1)])
def test_decoding_in_tiles_is_decoding_the_whole(name: str, size: tuple[int, int]) -> None:
    made = network(name)
    latent = torch.randn(made.config.latent_channels, *size, generator=torch.Generator().manual_seed(1))
    whole = made.decode(latent[None]).sample[0]
    for plan in plans(kl_tiling.decoder_steps(made), latent):
        torch.testing.assert_close(assembled(plan, latent), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(24, 40), (37, 21)])
def test_encoding_in_tiles_is_encoding_the_whole(name: str, size: tuple[int, int]) -> None:
    made = network(name)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = made.encode(image[None] / 127.5 - 1).latent_dist
    whole = found.parameters[0]
    for plan in plans(kl_tiling.encoder_steps(made), image):
        torch.testing.assert_close(assembled(plan, image), whole, rtol=0, atol=2e-5)


def test_less_memory_takes_more_passes_and_smaller_tiles() -> None:
    steps, shape = kl_tiling.decoder_steps(network("attention")), Shape(4, 24, 24)
    whole = kl_tiling.plan(steps, shape, memory=float("inf"))
    assert whole.work == whole.whole_work
    assert kl_tiling.halo(whole) == 0
    before = whole
    for share in (0.6, 0.4, 0.25):
        plan = kl_tiling.plan(steps, shape, memory=whole.peak * share)
        assert plan.peak <= whole.peak * share
        assert plan.work > before.work
        assert plan.whole_work == whole.work
        assert len(plan.passes) >= len(before.passes)
        before = plan
    assert len(before.passes) > 6
    assert kl_tiling.halo(before) > 0
    least = kl_tiling.plan(steps, shape, memory=0)
    assert least.peak > 0
    assert kl_tiling.plan(steps, shape, memory=least.peak).peak <= least.peak


def test_published_sizes_are_planned_without_weights() -> None:
    """4096 × 4096 pixels by an autoencoder of published width: 3 GB instead of 50."""
    with torch.device("meta"):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        made = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, **blocks)
    for steps, shape in ((kl_tiling.decoder_steps(made), Shape(16, 512, 512)), (kl_tiling.encoder_steps(made), Shape(3, 4096, 4096))):
        assert kl_tiling.plan(steps, shape, memory=float("inf")).peak > 20e9
        plan = kl_tiling.plan(steps, shape, memory=3e9)
        assert plan.peak <= 3e9
        assert plan.work < 6 * plan.whole_work


def test_other_blocks_are_refused() -> None:
    made = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    )  # fmt: skip
    for steps, block in ((kl_tiling.decoder_steps, "AttnUpDecoderBlock2D"), (kl_tiling.encoder_steps, "AttnDownEncoderBlock2D")):
        with pytest.raises(ValueError, match=f"{block} of this kind cannot run in tiles"):
            steps(made)


@pytest.mark.parametrize("kind", ["flux-vae", "flux2-vae"])
def test_codecs_use_tiles_under_a_limit(kind: str, tmp_path: Path) -> None:
    folder = autoencoder(tmp_path, kind)
    whole = codecs.make(kind, folder)
    size = (96, 160)
    assert whole.tiling(*size).splits == whole.tiling(*size, "encode").splits == 1
    needed = [whole.tiling(*size, direction).bytes for direction in ("encode", "decode")]
    tiled = codecs.make(kind, folder, memory_gb=min(needed) / 4e9)
    assert all(tiled.tiling(*size, direction).splits > 1 for direction in ("encode", "decode"))
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    (mean,), deviation = tiled.encode([image])
    (expected,), expected_deviation = whole.encode([image])
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)
    assert (deviation is None) == (expected_deviation is None) == (kind == "flux2-vae")
    if deviation is not None and expected_deviation is not None:
        torch.testing.assert_close(deviation[0], expected_deviation[0], rtol=1e-4, atol=1e-4)
    decoded, expected_image = tiled.decode([mean])[0], whole.decode([mean])[0]
    assert decoded.shape == image.shape
    assert (decoded.int() - expected_image.int()).abs().max() <= 1
    with pytest.raises(ValueError, match=r"codec\.memory_gb: decoding 160x96 pixels takes at least"):
        codecs.make(kind, folder, memory_gb=1e-6).decode([mean])


MEASURE = """
import json, sys, torch
from diffusers import AutoencoderKL
from tim.codecs import kl_tiling

def memory(key):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

direction = sys.argv[1]
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
made = AutoencoderKL(block_out_channels=(32, 32, 32), layers_per_block=1, **blocks).eval()
source = torch.randn(4, 128, 128) if direction == "decode" else torch.randint(0, 256, (3, 512, 512), dtype=torch.uint8)
steps = kl_tiling.decoder_steps(made) if direction == "decode" else kl_tiling.encoder_steps(made)
shape = kl_tiling.Shape(*source.shape)
small = source[:, :16, :16]
list(kl_tiling.run(kl_tiling.plan(steps, kl_tiling.Shape(*small.shape), memory=1e9), small, device=torch.device("cpu")))
whole = kl_tiling.plan(steps, shape, memory=float("inf")).peak
for limit in (0.75 * whole, whole):
    plan = kl_tiling.plan(steps, shape, memory=limit)
    output = torch.zeros(plan.shapes[-1])
    output += 1
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    for (rows, columns), values in kl_tiling.run(plan, source, device=torch.device("cpu")):
        output[:, slice(*rows), slice(*columns)] = values
        del values
    print(json.dumps({"measured": memory("VmHWM") - before, "predicted": plan.peak, "limit": limit, "passes": len(plan.passes)}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by Linux's /proc")
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_peak_memory_is_within_the_prediction(direction: str, tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)

    command = [sys.executable, str(script), direction]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system, and is measured again
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **returned}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=True)
    tiled, whole = map(json.loads, done.stdout.splitlines())
    assert whole["passes"] == 1 < tiled["passes"]
    for found in (whole, tiled):
        assert 0.3 * found["predicted"] < found["measured"] < found["predicted"] / PLANNED  # the codec plans with that share of its limit
        assert found["predicted"] <= found["limit"]
    assert tiled["measured"] < whole["measured"]
