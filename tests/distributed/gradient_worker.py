"""Run by test_gradients.py on several ranks: the gradient of a whole step (derivative, guidance, alignment) under each ZeRO stage, against
one process without DeepSpeed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoints.tensor_fragments import Fragment
from launch.distributed.ranks import Ranks, process_group
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.training.guidance_network import GuidanceNetwork
from tests.distributed.gradients import step_with_gradients
from tests.tim.tiny import TINY, tiny_network
from tim import PackedText, TransitionObjective, TransitionTransformer, transports
from tim.objective import Guide

PARAMS = {**TINY, "z_dim": 12, "projector_dim": 16, "encoder_depth": 1}
PACKS = [[(4, 4), (2, 8)], [(12, 4)], [(4, 6), (2, 2), (6, 6)], [(8, 2), (4, 4)]]  # sizes of latents
KINDS = [[0, 2], [2], [1, 2, 0], [0, 1]]  # the last pack has no derivative
IMAGES = sum(map(len, PACKS))


def pack(index: int) -> dict[str, Any]:
    """Arguments of the objective for a pack."""
    generator = torch.Generator().manual_seed(index)
    sizes = PACKS[index]
    tokens = sum(height * width // 4 for height, width in sizes)
    return {
        "latents": [torch.randn(3, *size, generator=generator) for size in sizes],
        "condition": PackedText.from_features([torch.randn(1 + number, 16, generator=generator) for number, _ in enumerate(sizes)]),
        "noise": [torch.randn(3, *size, generator=generator) for size in sizes],
        "kinds": torch.tensor(KINDS[index]),
        "uniforms": torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64),
        "weights": torch.ones(len(sizes)),
        "teacher": torch.randn(tokens, 12, generator=generator),
    }


def guidance_network(average: dict[str, Fragment], ranks: Ranks) -> GuidanceNetwork:
    with torch.device("meta"):
        network = TransitionTransformer.from_official(PARAMS)
    guide = GuidanceNetwork(network, ranks=ranks)
    guide.update_from(average)
    return guide


def losses(network: Any, *, plain: Any, guide: GuidanceNetwork, derivative: Any, stage: int) -> Callable[[int], Tensor]:
    """Loss of a pack by its index. plain: the network that evaluates the derivative."""
    objective = TransitionObjective(
        transports.make("ot_fm"), patch_size=2, derivative=derivative, shift=None, alignment=0.5, equal_forwards=stage == 3
    )

    def loss(index: int) -> Tensor:
        arguments = pack(index)
        empty = PackedText.from_features([torch.zeros(1, 16)] * len(PACKS[index]))
        latents, condition = arguments.pop("latents"), arguments.pop("condition")
        guidance = Guide(guide, empty, interval=(0.0, 1.0))
        return objective(network, latents, condition, **arguments, derivative_network=plain, guide=guidance).loss

    return loss


def gradient_alone(derivative: str, ranks: Ranks) -> dict[str, Tensor]:
    """The gradient of all packs in this process, without DeepSpeed."""
    network = tiny_network(PARAMS).train()
    whole = {name: Fragment(0, parameter.detach().flatten()) for name, parameter in network.named_parameters()}
    guide = guidance_network(whole if ranks.is_main else {}, ranks)
    loss = losses(network, plain=network, guide=guide, derivative=derivative, stage=0)
    for index in range(len(PACKS)):
        (loss(index) / IMAGES).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def gradient_of_ranks(stage: int, derivative: str, ranks: Ranks) -> dict[str, Tensor]:
    engine = Engine(tiny_network(PARAMS), ranks=ranks, stage=stage)
    guide = guidance_network(ShardedEMA(engine.fragments(), decay=0.5).average, ranks)
    loss = losses(engine, plain=engine.module, guide=guide, derivative=derivative, stage=stage)
    for index in range(ranks.rank, len(PACKS), ranks.size):
        engine.accumulate(loss(index), count=IMAGES)
    gradients, _ = step_with_gradients(engine, lr=0.0)
    engine.close()
    return gradients


def main() -> None:
    report = {}
    with process_group() as ranks:
        for case in sys.argv[2:]:
            stage, derivative = case.split(":")
            expected = gradient_alone(derivative, ranks)
            found = gradient_of_ranks(int(stage), derivative, ranks)
            assert set(found) == set(expected)
            difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected) ** 0.5
            report[case] = difference / sum(float(gradient.double().square().sum()) for gradient in expected.values()) ** 0.5
        Path(f"{sys.argv[1]}-{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
