"""Run by test_eight_bit.py on two ranks: 8-bit AdamW trains, is saved, and goes on from what was saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import Checkpoint, CheckpointMetadata
from launch.checkpoints.saving.background import Part
from launch.distributed.ranks import Ranks, process_group
from launch.engine.engine import Engine
from tests.distributed.engine_worker import OFFLOAD, PACKS, Network, loss_of, packs_of
from tests.launch.checkpoints.writing import save

STEPS, MORE = 12, 3
LR = 1e-2


def make_engine(ranks: Ranks, case: str, *, optimizer: Any = "adamw8bit") -> Engine:
    stage, *offload = case.split("-")
    deepspeed = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": OFFLOAD[int(stage)]} if offload else None
    return Engine(Network(), ranks=ranks, stage=int(stage), weight_decay=0.1, optimizer=optimizer, deepspeed=deepspeed)


def take_steps(engine: Engine, ranks: Ranks, steps: range) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    rows = []
    for step in steps:
        total = 0.0
        for pack in packs_of(step % 4)[ranks.rank :: ranks.size]:
            loss = loss_of(engine(pack))
            engine.accumulate(loss, count=sum(PACKS))
            total += float(loss.detach())
        norm = engine.step(lr=LR).grad_norm
        rows.append([float(ranks.sum(torch.tensor(total))) / sum(PACKS), norm])
    return rows


def part_of(engine: Engine) -> Part:
    return Part(engine.shapes, {"weights": engine.fragments(), **engine.moments()})


def resume(ranks: Ranks, saved: Path, case: str) -> Engine:
    engine = make_engine(ranks, case)
    engine.load(Checkpoint(saved, checkpoint.check(saved)).pieces, updates=STEPS)
    return engine


def check_case(ranks: Ranks, case: str, folder: Path) -> None:
    engine = make_engine(ranks, case)
    first = take_steps(engine, ranks, range(STEPS))
    metadata = CheckpointMetadata(step=STEPS, world_size=ranks.size, config_hash="")
    saved = save(folder / "saved", metadata, part_of(engine), ranks=ranks)
    unbroken = take_steps(engine, ranks, range(STEPS, STEPS + MORE))
    save(folder / "unbroken", metadata, part_of(engine), ranks=ranks)
    engine.close()

    engine = resume(ranks, saved, case)
    save(folder / "loaded", metadata, part_of(engine), ranks=ranks)
    resumed = take_steps(engine, ranks, range(STEPS, STEPS + MORE))
    save(folder / "resumed", metadata, part_of(engine), ranks=ranks)
    engine.close()

    if ranks.is_main:
        (folder / "report.json").write_text(json.dumps({"first": first, "unbroken": unbroken, "resumed": resumed}))


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group() as ranks:
        for case in sys.argv[2:]:
            check_case(ranks, case, folder / case)
        engine = make_engine(ranks, "1", optimizer="adamw")
        exact = take_steps(engine, ranks, range(STEPS))
        engine.close()
        if ranks.is_main:
            (folder / "exact.json").write_text(json.dumps(exact))


if __name__ == "__main__":
    main()
