"""Run by test_lora.py on several ranks: a step with adapters, derivative, guidance, alignment and dropout under each ZeRO stage, against
one process without DeepSpeed."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.checkpoints.tensor_fragments import Fragment
from launch.config.load import load_config
from launch.distributed.ranks import Ranks, process_group
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.engine.optimizers import ADAM_EPSILON
from launch.finetuning.lora import draw_dropout
from launch.finetuning.trainable import limit_training
from launch.training.guidance_network import GuidanceNetwork
from tests.distributed.gradient_worker import IMAGES, PACKS, PARAMS, losses
from tests.distributed.gradients import step_with_gradients
from tests.tim.tiny import tiny_network
from tim import TransitionTransformer

LR = 1e-2
PARTS = {
    "lora": ["train.lora={rank: 4, alpha: 8, dropout: 0.25}"],
    "freeze": ["train.freeze=['blocks.0.*', x_embedder.*]"],
}


def finetuned(network: TransitionTransformer, kind: str) -> TransitionTransformer:
    """Limit what is trained; nothing is left at its zero initialisation."""
    params = {**PARAMS, "num_heads": 2, "in_channels": None}
    overrides = [f"network.params={json.dumps(params)}", "objective.alignment={kind: radio, path: none}", "train.steps=1", "corpus=none"]
    torch.manual_seed(1)
    limit_training(network, load_config(None, overrides=[*overrides, *PARTS[kind]]))
    if all(not parameter.is_meta for parameter in network.parameters()):
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return network


def guidance_network(average: dict[str, Fragment], frozen: Any, *, kind: str, ranks: Ranks) -> GuidanceNetwork:
    with torch.device("meta"):
        network = finetuned(TransitionTransformer.from_official(PARAMS), kind)
    guide = GuidanceNetwork(network, ranks=ranks, frozen=frozen)
    guide.update_from(average)
    return guide


@cache
def alone(kind: str, derivative: str, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a step, and all weights after it, of this process without DeepSpeed."""
    network = finetuned(tiny_network(PARAMS), kind).train()
    draw_dropout(network, seed=0, step=3)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    frozen = [(name, parameter) for name, parameter in network.named_parameters() if name not in trained]
    whole = {name: Fragment(0, parameter.detach().flatten()) for name, parameter in trained.items()}
    guide = guidance_network(whole if ranks.is_main else {}, frozen, kind=kind, ranks=ranks)
    loss = losses(network, plain=network, guide=guide, derivative=derivative, stage=0)
    for index in range(len(PACKS)):
        (loss(index) / IMAGES).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    nn.utils.clip_grad_norm_(trained.values(), 1.0)
    torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.95), eps=ADAM_EPSILON, weight_decay=0.0).step()
    return gradients, {name: parameter.detach() for name, parameter in network.named_parameters()}


def check_case(case: str, ranks: Ranks) -> dict[str, Any]:
    stage, kind, derivative, optimizer = case.split(":")
    expected, weights = alone(kind, derivative, ranks)
    chosen: Any = optimizer
    engine = Engine(finetuned(tiny_network(PARAMS), kind), ranks=ranks, stage=int(stage), optimizer=chosen)
    draw_dropout(engine.module, seed=0, step=3)
    frozen = dict(engine.frozen())
    guide = guidance_network(ShardedEMA(engine.fragments(), decay=0.5).average, frozen.items(), kind=kind, ranks=ranks)
    loss = losses(engine, plain=engine.module, guide=guide, derivative=derivative, stage=int(stage))
    for index in range(ranks.rank, -(-len(PACKS) // ranks.size) * ranks.size, ranks.size):  # as many packs on every rank
        engine.accumulate(loss(index) if index < len(PACKS) else 0 * loss(0), count=IMAGES)
    gradients, _ = step_with_gradients(engine, lr=LR)
    assert set(gradients) == set(expected) == set(engine.shapes)
    difference = sum(float((gradients[name] - expected[name]).double().square().sum()) for name in expected) ** 0.5
    moved = []
    for name, fragment in engine.fragments().items():
        values = weights[name].flatten()[fragment.start : fragment.start + len(fragment.values)]
        moved.append(float((fragment.values - values).abs().max()))
    report = {
        "gradient_error": difference / sum(float(gradient.double().square().sum()) for gradient in expected.values()) ** 0.5,
        "weight_error": max(moved, default=0.0),
        "frozen": all(torch.equal(value, frozen[name]) and torch.equal(value, weights[name]) for name, value in engine.frozen()),
        "frozen_count": len(frozen),
        "moments": sorted({name for kind in engine.moments().values() for name in kind} - set(engine.shapes)),
    }
    engine.close()
    return report


def main() -> None:
    reports = {}
    with process_group() as ranks:
        for case in sys.argv[2:]:
            reports[case] = check_case(case, ranks)
        Path(f"{sys.argv[1]}-{ranks.rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
