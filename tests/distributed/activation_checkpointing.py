"""Gradients on two ranks with activation checkpointing under ZeRO, against one process without it. Called by engine_worker.py."""

from __future__ import annotations

import torch
from torch import Tensor

from launch.distributed.ranks import Ranks
from launch.engine.engine import Engine
from tests.distributed.gradients import step_with_gradients
from tests.tim.tiny import tiny_network
from tim import PackedText, PackedTokens

CASES = ((1, 1), (2, 2), (3, 1))  # ZeRO stage, every n-th block
SIZES = [(4, 4), (2, 8), (12, 4), (4, 6)]  # one pack of two images on each rank


def pack(images: list[int]) -> tuple[PackedTokens, Tensor, Tensor, PackedText]:
    latents, captions = [], []
    for i in images:
        generator = torch.Generator().manual_seed(i)
        latents.append(torch.randn(3, *SIZES[i], generator=generator))
        captions.append(torch.randn(1 + i, 16, generator=generator))
    t = torch.tensor([0.9, 0.5, 0.3, 1.0])[images]
    return PackedTokens.from_latents(latents, 2), t, t / 2, PackedText.from_features(captions)


def alone() -> dict[str, Tensor]:
    network = tiny_network()
    (network(*pack([0, 1, 2, 3])).tokens.square().sum() / len(SIZES)).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def gradient_error(ranks: Ranks, *, stage: int, every: int) -> float:
    """The largest difference to one process without checkpointing, over the gradient's largest entry."""
    network = tiny_network()
    network.configure_execution(checkpoint_every=every)
    engine = Engine(network, ranks=ranks, stage=stage)
    mine = pack([2 * ranks.rank, 2 * ranks.rank + 1])
    with torch.no_grad():
        engine.module(*mine)
    engine.accumulate(engine(*mine).tokens.square().sum(), count=len(SIZES))
    expected, worst = alone(), 0.0
    found, _ = step_with_gradients(engine, lr=0.0)
    for name, _ in engine.module.named_parameters():
        worst = max(worst, float((found[name] - expected[name]).abs().max()))
    engine.close()
    return worst / max(float(gradient.abs().max()) for gradient in expected.values())


def gradient_errors(ranks: Ranks) -> dict[str, float]:
    """By ZeRO stage and spacing of the checkpoints."""
    return {f"{stage}-{every}": gradient_error(ranks, stage=stage, every=every) for stage, every in CASES}
