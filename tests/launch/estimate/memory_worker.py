"""Run by test_memory.py on one or two ranks: training steps with the parts of a run, and the memory that they take.

Arguments: a folder for the results, then cases STAGE-CHECKPOINTING-PRECISION-OPTIMIZER.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from launch.config.resolve import resolve
from launch.config.schema import Config
from launch.distributed.ranks import Ranks, process_group
from launch.engine.ema import ShardedEMA
from launch.hardware.tensor_memory import TensorMemory
from launch.training.build import execution, make_engine, make_network, make_objective
from tim import PackedText

SIDES = ((16, 16), (24, 12))  # of the images of a pack, in tokens
PATCH, CAPTION, FEATURES, STEPS, PACKS = 4, 8, 64, 2, 2  # packs of each rank


def config_of(case: str, *, width: int = 256, depth: int = 4, images: int = 8) -> Config:
    stage, checkpointing, precision, optimizer = case.split("-")
    tokens = images // 2 * sum(height * columns for height, columns in SIDES)
    content: dict[str, Any] = {
        "plan": {"max_tokens": 288, "tokens_per_pack": tokens, "packs_per_step": 2 * PACKS},
        "text": {"max_tokens": CAPTION},
        "network": {"params": {"depth": depth, "hidden_size": width, "num_heads": 4, "patch_size": PATCH, "cap_feat_dim": FEATURES}},
        "train": {"steps": 1, "zero": int(stage), "checkpointing": checkpointing, "precision": precision, "optimizer": optimizer},
    }
    content["train"]["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 1_000_000}}
    return resolve(Config.model_validate(content))


def pack_of(images: int, *, seed: int) -> dict[str, Any]:
    """Inputs of the objective: a third of the images r = t, r = 0 and r < t each."""
    random = torch.Generator().manual_seed(seed)
    sides = [(PATCH * rows, PATCH * columns) for rows, columns in SIDES] * (images // 2)
    latents, noise = ([torch.randn(3, *side, generator=random) for side in sides] for _ in range(2))
    return {
        "latents": latents,
        "condition": PackedText.from_features([torch.randn(CAPTION, FEATURES, generator=random) for _ in sides]),
        "noise": noise,
        "kinds": torch.arange(images) % 3,
        "uniforms": torch.rand(images, 2, generator=random),
        "weights": torch.ones(images),
    }


def measure(ranks: Ranks, case: str) -> dict[str, Any]:
    config, memory = config_of(case), TensorMemory()
    images = config.plan.tokens_per_pack // 272
    packs = [pack_of(images, seed=ranks.rank * PACKS + number) for number in range(PACKS)]
    gc.collect()
    with memory:
        network = make_network(config.network)
        memory.add(network.parameters())
        network.configure_execution(**execution(config.train, ranks.device, tokens_per_pack=config.plan.tokens_per_pack))
        engine = make_engine(config.train, network, ranks=ranks)
        ema = ShardedEMA(engine.fragments(), decay=config.train.ema)
        twin = ShardedEMA(engine.fragments(), decay=config.train.ema, device="cpu")
        objective = make_objective(config, pixels_per_cell=1, ranks=ranks)
        setup = memory.now
        for step in range(STEPS):
            memory.restart()
            between = memory.now
            for pack in packs:
                latents, condition = pack["latents"], pack["condition"]
                rest = {name: value for name, value in pack.items() if name not in ("latents", "condition")}
                losses = objective(engine, latents, condition, derivative_network=engine.module, **rest)
                engine.accumulate(losses.loss, count=images * PACKS * ranks.size)
            del losses
            before_update, passes = memory.now, memory.peak
            memory.restart()
            engine.step(lr=1e-4)
            for each in (ema, twin):
                each.update(engine.fragments(), updates=step)
            update = memory.peak
    found: dict[str, Any] = {
        "parameters": sum(map(torch.Size.numel, map(torch.Size, engine.shapes.values()))),
        "setup": setup,
        "between": between,
    }
    found |= {"passes": passes, "before_update": before_update, "update": update, "after": memory.now}
    pairs = zip(ema.average.values(), twin.average.values(), strict=True)
    found["equal averages"] = all(torch.equal(one.values, other.values) for one, other in pairs)
    engine.close()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group() as ranks:
        for case in sys.argv[2:]:
            (folder / f"{case}-{ranks.rank}.json").write_text(json.dumps(measure(ranks, case)))


if __name__ == "__main__":
    main()
