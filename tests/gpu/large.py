"""The published size: steps of TiM-XL/1 at 16,384 tokens, and a sample of 4096 × 4096 pixels, with time and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from typing import Any
from unittest import mock

import torch

from launch.config import yaml_file
from launch.config.recipes import recipe_path
from launch.distributed.ranks import process_group
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from tests.gpu.case import TINY, Case, Inputs
from tests.gpu.compile import compiler
from tests.gpu.runner import Result
from tim import TransitionObjective, codecs, sample, transports
from tim.codecs.dc_ae import DCAE
from tim.flops import Lengths, activation_bytes, forward_flops, step_flops
from tim.network import OFFICIAL_PARAMS
from tim.objective import CONSISTENCY, DIFFUSION, TRANSITION

RECIPE = "t2i-xl-1"
BYTES_PER_PARAMETER = 24  # ZeRO 1 to 3 on one rank: weights, master weights, gradients, two moments, average; 4 bytes each
SHARES = (DIFFUSION, TRANSITION, DIFFUSION, TRANSITION, CONSISTENCY, DIFFUSION, TRANSITION, DIFFUSION, TRANSITION, DIFFUSION)
PACKS = {"16 of 1024x1024": ((32, 32),) * 16, "64 of 512x512": ((16, 16),) * 64, "1 of 4096x4096": ((128, 128),)}
TINY_PACKS = {"4 of 4x4": ((4, 4),) * 4}
BUCKET_BYTES = 4 * 500_000_000  # in which DeepSpeed collects gradients
MEMORY_BOUND = 1.4  # of the estimate
SAMPLE_STEPS, GUIDANCE = 4, 2.5


def xl_step(case: Case) -> Result:
    """Time, share of the matrix product's rate and peak memory of a training step, by images in the pack."""
    variants = {"checkpointed ": {"checkpoint_every": 1}, "": {}}  # what needs more memory last
    return _measured_steps(case, case.size(PACKS, TINY_PACKS), variants)


def xl_compiled(case: Case) -> Result:
    """The same with `train.compile`."""
    name, grids = next(iter(case.size(PACKS, TINY_PACKS).items()))
    tokens = sum(height * width for height, width in grids)
    with mock.patch.object(torch, "compile", compiler(case)):
        return _measured_steps(case, {name: grids}, {"compiled ": {"compile_for": tokens}})


def sample_4096(case: Case) -> Result:
    """Time and memory of one guided image of 4096 × 4096 pixels in few steps, without its codec."""
    params = _params(case)
    network = case.network(params).eval().requires_grad_(False)
    side = case.size(128, 8)
    noise = [case.randn(params["in_channels"], side, side, seed=1)]
    texts = [Inputs([], [], [case.randn(count, params["cap_feat_dim"], seed=count)]).text for count in (case.size(256, 7), 1)]
    case.reset_peak()
    before, latents = case.allocated_bytes(), []

    def draw() -> None:
        with torch.autocast(case.device.type, torch.bfloat16):
            latents[:] = sample(
                network, noise, texts[0], transport=transports.make("ot_fm"), steps=SAMPLE_STEPS, guidance=GUIDANCE, null_condition=texts[1]
            ).latents

    seconds = case.seconds(draw, repeats=2, warmup=1)
    lengths = Lengths([side**2] * 2, [len(text.features) for text in texts])
    flops = SAMPLE_STEPS * forward_flops(params, lengths)
    figures = {
        "seconds": seconds,
        "seconds per step": seconds / SAMPLE_STEPS,
        "share of matmul rate": flops / seconds / case.matmul_rate(torch.bfloat16),
        "memory beside the weights, GiB": _gib(case, before),
    }
    return Result(figures, expected={"the latents are finite": bool(torch.isfinite(latents[0]).all())})


def decode_4096(case: Case) -> Result:
    """Time and memory of decoding 4096 × 4096 pixels in tiles within 20 GB: DC-AE with random weights, or raw pixels without diffusers."""
    side = case.size(128, 4)
    if case.tiny or find_spec("diffusers") is None:
        codec: codecs.Codec = codecs.make("pixel", device=case.device)
        latent, name = case.randn(3, 32 * side, 32 * side, seed=1), "pixel codec"
    else:
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC  # pyright: ignore[reportMissingImports]

        with torch.device(case.device):
            network = AutoencoderDC(**_DC_AE)
        codec, name = DCAE(network, codecs.geometry("dc-ae"), device=case.device, memory_gb=20), "DC-AE, float32"
        latent = case.randn(codec.channels, side, side, seed=1)
    case.reset_peak()
    before = case.allocated_bytes()
    images = codec.decode([latent])
    seconds = case.seconds(lambda: codec.decode([latent]), repeats=1, warmup=0)
    figures = {"codec": name, "seconds": seconds, "memory beside the weights, GiB": _gib(case, before)}
    return Result(figures, expected={"an image of the full size": images[0].shape == (3, 32 * side, 32 * side)})


_DC_AE: dict[str, Any] = {  # dc-ae-f32c32
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3,) * 6,
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "scaling_factor": 0.41407,
}


def _params(case: Case) -> dict[str, Any]:
    """Complete parameters of the recipe's network, without its projection for the alignment teacher."""
    given = {**TINY, "depth": 1} if case.tiny else yaml_file.read(recipe_path(RECIPE)).values["network"]["params"]
    known = {**OFFICIAL_PARAMS, "z_dim": 0}
    return {**known, **{key: value for key, value in given.items() if key != "z_dim"}}


def _measured_steps(case: Case, packs: Mapping[str, Sequence[tuple[int, int]]], variants: Mapping[str, dict[str, Any]]) -> Result:
    """Figures of a step of each pack with each way to run the network: `configure_execution`'s arguments by label."""
    params, figures = _params(case), {}
    bounds: dict[str, float] = {}
    expected: dict[str, bool] = {}
    network = case.network(params)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    rate = case.matmul_rate(torch.bfloat16)
    figures |= {"parameters, millions": parameters / 1e6, "matmul TFLOP/s": rate / 1e12}
    with process_group() as ranks:
        engine = Engine(network, ranks=ranks, stage=2, precision="bf16", weight_decay=0.01)
        ema = ShardedEMA(engine.fragments(), decay=0.9999)
        for (variant, execution), (name, grids) in product(variants.items(), packs.items()):
            network.configure_execution(**execution)
            label, step = f"{variant}{name}", _Step(case, engine, ema, params, grids)
            try:
                measured = _measured(case, step, rate=rate)
            except torch.OutOfMemoryError as error:
                expected[f"{label}: fits in memory ({str(error)[:200]})"] = False
                break
            activations = activation_bytes(params, step.lengths, precision="bf16", checkpoint_every=execution.get("checkpoint_every", 0))
            estimate = BYTES_PER_PARAMETER * parameters + BUCKET_BYTES + activations
            measured["estimated GiB"] = estimate / 2**30
            if (peak := case.peak_bytes()) is not None:
                measured |= {"peak GiB": peak / 2**30, "peak over estimate": peak / estimate}
                bounds[f"{label}: peak over estimate"] = MEMORY_BOUND
            figures |= {f"{label}: {key}": value for key, value in measured.items()}
            expected[f"{label}: every step is applied"] = step.applied
        engine.close()
    return Result(figures, bounds, expected)


def _measured(case: Case, step: _Step, *, rate: float) -> dict[str, float]:
    """Seconds of a step, of the first one too, and its share of the matrix product's rate. Leaves the peak of memory to read."""
    start = time.monotonic()
    step()
    case.synchronize()
    first = time.monotonic() - start
    gc.collect()
    case.reset_peak()
    seconds = case.seconds(step, repeats=case.size(3, 1), warmup=1)
    return {"seconds": seconds, "seconds of the first step": first, "share of matmul rate": step.flops() / seconds / rate}


class _Step:
    """A training step of one pack, as the trainer takes it, with the recipe's shares of kinds."""

    def __init__(self, case: Case, engine: Engine, ema: ShardedEMA, params: dict[str, Any], grids: Sequence[tuple[int, int]]) -> None:
        self.engine, self.ema, self.params = engine, ema, params
        texts = [case.size(256, 5)] * len(grids)
        self.inputs = case.pack(params, grids, texts)
        self.text = self.inputs.text
        self.kinds = torch.tensor([SHARES[(i + 1) % len(SHARES)] for i in range(len(grids))])
        self.uniforms = torch.rand(len(grids), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.lengths = Lengths([height * width for height, width in grids], texts)
        precision = "fp16" if case.on_gpu else "fp32"
        settings: dict[str, Any] = {"patch_size": params["patch_size"], "pixels_per_cell": 32, "equal_forwards": False}
        self.objective = TransitionObjective(transports.make("ot_fm"), derivative_precision=precision, **settings)
        self.applied = True
        self.updates = 0

    def __call__(self) -> None:
        weights = torch.ones(len(self.kinds))
        losses = self.objective(
            self.engine,
            self.inputs.latents,
            self.text,
            noise=self.inputs.noise,
            kinds=self.kinds,
            uniforms=self.uniforms,
            weights=weights,
            derivative_network=self.engine.module,
        )
        self.engine.accumulate(losses.loss, count=len(self.kinds))
        self.applied &= self.engine.step(lr=1e-6).applied
        self.ema.update(self.engine.fragments(), updates=self.updates)
        self.updates += 1

    def flops(self) -> int:
        moving = (self.kinds == TRANSITION).nonzero()[:, 0].tolist()
        return step_flops(self.params, self.lengths, moving=moving)


def _gib(case: Case, before: int) -> float | None:
    peak = case.peak_bytes()
    return None if peak is None else (peak - before) / 2**30
