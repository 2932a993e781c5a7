"""Run by test_engine.py on two ranks: `Engine`, `ShardedEMA` and checkpoint files and activation
checkpointing, against one process doing the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import Checkpoint, CheckpointMetadata
from launch.checkpoints.saving.background import Part
from launch.distributed.ranks import Ranks, process_group
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.engine.muon import orthogonalise
from launch.engine.optimizers import ADAM_EPSILON
from tests.distributed import activation_checkpointing
from tests.distributed.gradients import step_with_gradients
from tests.launch.checkpoints.writing import save

PACKS = [3, 1, 4, 2]  # images in each pack of a step
STEPS = 4
DECAY = 0.5
LR = 1e-2
_CPU = {"device": "cpu", "pin_memory": False}
OFFLOAD = {
    1: {"offload_optimizer": _CPU, "reduce_bucket_size": 500},
    2: {"offload_optimizer": _CPU, "overlap_comm": True},
    3: {"offload_optimizer": _CPU, "offload_param": _CPU, "sub_group_size": 500, "stage3_param_persistence_threshold": 0},
}


class Network(nn.Module):
    """Odd sizes, so that partitions cut through parameters; the first block is used two times a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(7, 33), nn.Linear(20, 5, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(33, 33), nn.Linear(33, 20)])

    def forward(self, x: Tensor) -> Tensor:
        twice, narrow = self.blocks
        return self.last(torch.tanh(narrow(torch.tanh(twice(torch.tanh(twice(torch.tanh(self.first(x)))))))))


def loss_of(out: Tensor) -> Tensor:
    return (out.square().mean(1) + (out - 1).abs().mean(1)).sum()


def packs_of(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(count, 7, generator=generator) for count in PACKS]


def make_engine(ranks: Ranks, case: str) -> Engine:
    stage, precision, optimizer, *offload = case.split("-")
    deepspeed = {"zero_force_ds_cpu_optimizer": offload == ["cpuadam"], "zero_optimization": OFFLOAD[int(stage)]} if offload else None
    settings: dict[str, Any] = {"precision": precision, "optimizer": optimizer, "deepspeed": deepspeed}
    return Engine(Network(), ranks=ranks, stage=int(stage), weight_decay=0.1, **settings)


def take_step(engine: Engine, ranks: Ranks, step: int, *, poison: bool = False) -> tuple[dict[str, Tensor], float, bool]:
    """One step as the trainer does it: evaluations without gradient and with, unequal packs. Returns gradients, their norm, applied."""
    mine = packs_of(step)[ranks.rank :: ranks.size]
    for index, pack in enumerate(mine):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            assert engine.module(pack).dtype == torch.float32
        loss = loss_of(engine(pack))
        if poison and ranks.is_main and index == 0:
            loss = loss * torch.inf
        engine.accumulate(loss, count=sum(PACKS))
    gradients, result = step_with_gradients(engine, lr=LR)
    return gradients, result.grad_norm, result.applied


class PlainMuon:
    """Muon as its paper writes it, matrix by matrix, in torch's form of momentum."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices, self.momenta = matrices, [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self) -> None:
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            assert matrix.grad is not None
            momentum.mul_(0.95).add_(matrix.grad, alpha=0.05)
            update = orthogonalise(0.05 * matrix.grad + 0.95 * momentum)
            matrix.mul_(1 - LR * 0.1).sub_(LR * 0.2 * max(matrix.shape) ** 0.5 * update)


def alone(optimizer_name: str) -> tuple[list[dict[str, Tensor]], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and norms of every step, then weights and average, of one process without DeepSpeed."""
    network = Network()
    hidden = [block.weight for block in network.blocks if isinstance(block, nn.Linear)] if optimizer_name == "muon" else []
    others = [p for p in network.parameters() if all(p is not matrix for matrix in hidden)]
    matrices, vectors = ([p for p in others if (p.ndim >= 2) == wanted] for wanted in (True, False))
    muon = PlainMuon(hidden)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=ADAM_EPSILON)
    average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    gradients, norms = [], []
    for step in range(STEPS):
        network.zero_grad()
        (sum(loss_of(network(pack)) for pack in packs_of(step)) / sum(PACKS)).backward()  # pyright: ignore[reportAttributeAccessIssue]
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None})
        norms.append(float(nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
        optimizer.step()
        muon.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, parameter in network.named_parameters():
            average[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    return gradients, norms, {name: parameter.detach() for name, parameter in network.named_parameters()}, average


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def resume(ranks: Ranks, saved: Path, case: str) -> list[float]:
    """Norms of the gradients of two steps from a checkpoint on; that of the second tells whether the moments were there in the first."""
    engine = make_engine(ranks, case)
    engine.load(Checkpoint(saved, checkpoint.check(saved)).pieces, updates=STEPS)
    norms = [take_step(engine, ranks, step)[1] for step in (91, 92)]
    engine.close()
    return norms


def check_case(ranks: Ranks, case: str, folder: Path) -> dict[str, object]:
    gradients, norms, weights, average = alone(case.split("-")[2])
    engine = make_engine(ranks, case)
    ema = ShardedEMA(engine.fragments(), decay=DECAY)
    gradient_error, norm_error = 0.0, 0.0
    for step in range(STEPS):
        found, norm, _ = take_step(engine, ranks, step)
        gradient_error = max(gradient_error, distance(found, gradients[step]))
        norm_error = max(norm_error, abs(norm - norms[step]))
        ema.update(engine.fragments(), updates=step)

    part = Part(engine.shapes, {"weights": engine.fragments(), "ema": ema.average, **engine.moments()})
    saved = save(folder, CheckpointMetadata(step=STEPS, world_size=ranks.size, config_hash=""), part, ranks=ranks)
    weight_error = distance(checkpoint.consolidate(saved, ema=False), weights)
    average_error = distance(checkpoint.consolidate(saved, ema=True), average)

    _, norm, applied = take_step(engine, ranks, 90, poison=True)
    poisoned = [applied, norm == norm and norm < float("inf")]
    unbroken = [take_step(engine, ranks, step)[1] for step in (91, 92)]
    engine.close()

    resumed = resume(ranks, saved, case)
    return {
        "gradient_error": gradient_error,
        "norm_error": norm_error,
        "weight_error": weight_error,
        "average_error": average_error,
        "poisoned": poisoned,
        "unbroken": unbroken,
        "resumed": resumed,
        "shares": ranks.gather(sum(fragment.values.numel() for fragment in ema.average.values())),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group() as ranks:
        for case in sys.argv[2:]:
            report = check_case(ranks, case, folder / case)
            (folder / f"{case}-{ranks.rank}.json").write_text(json.dumps(report))
        (folder / f"checkpointing-{ranks.rank}.json").write_text(json.dumps(activation_checkpointing.gradient_errors(ranks)))


if __name__ == "__main__":
    main()
