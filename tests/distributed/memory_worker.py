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


def config_of(case: str, *, images: int) -> Config:
    stage, checkpointing, precision, optimizer = case.split("-")
    tokens = images // 2 * sum(height * columns for height, columns in SIDES)
    content: dict[str, Any] = {
        "plan": {"max_tokens": 288, "tokens_per_pack": tokens, "packs_per_step": 2 * PACKS},
        "text": {"max_tokens": CAPTION},
        "network": {"params": {"depth": 4, "hidden_size": 256, "num_heads": 4, "patch_size": PATCH, "cap_feat_dim": FEATURES}},
        "train": {
            "steps": 1,
            "zero": int(stage),
            "checkpointing": checkpointing,
            "precision": precision,
            "optimizer": optimizer,
            "ema": (0.9999, 0.999),
        },
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


def measure(ranks: Ranks, case: str, *, images: int) -> dict[str, Any]:
    """Bytes of tensors at the peaks of the second step, and whether averages in host memory are the same."""
    config, memory = config_of(case, images=images), TensorMemory()
    packs = [pack_of(images, seed=ranks.rank * PACKS + number) for number in range(PACKS)]
    gc.collect()
    with memory:
        network = make_network(config.network)
        memory.add(network.parameters())
        network.configure_execution(**execution(config.train, ranks.device, tokens_per_pack=config.plan.tokens_per_pack))
        engine = make_engine(config.train, network, ranks=ranks)
        ema, twin = (ShardedEMA(engine.fragments(), decay=0.9999, device=device) for device in (None, "cpu"))
        objective = make_objective(config, pixels_per_cell=1, ranks=ranks)
        passes = update = 0
        for step in range(STEPS):
            memory.restart()
            for pack in packs:
                latents, condition = pack["latents"], pack["condition"]
                rest = {name: value for name, value in pack.items() if name not in ("latents", "condition")}
                loss = objective(engine, latents, condition, derivative_network=engine.module, **rest).loss
                engine.accumulate(loss, count=images * PACKS * ranks.size)
                del loss
            passes = memory.peak
            memory.restart()
            engine.step(lr=1e-4)
            for each in (ema, twin):
                each.update(engine.fragments(), updates=step)
            update = memory.peak
    pairs = zip(ema.average.values(), twin.average.values(), strict=True)
    equal = all(torch.equal(one.values, other.values) for one, other in pairs)
    engine.close()
    return {"forward and backward": passes, "update": update, "equal averages": equal}


def main() -> None:
    folder, images = Path(sys.argv[1]), int(sys.argv[2])
    with process_group() as ranks:
        for case in sys.argv[3:]:
            (folder / f"{case}-{ranks.rank}.json").write_text(json.dumps(measure(ranks, case, images=images)))


if __name__ == "__main__":
    main()
