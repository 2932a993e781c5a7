"""The engine on one rank: every ZeRO stage against stage 0, and checkpoints from one stage to the next."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.checkpoint import Checkpoint, CheckpointMetadata
from launch.checkpoints.saving.background import Part
from launch.distributed.ranks import Ranks, process_group
from launch.engine.engine import Engine
from tests.gpu.case import TINY, Case, Inputs, relative_error
from tests.gpu.runner import Result
from tests.launch.checkpoints.writing import save
from tim import TransitionObjective, transports

SMALL = {**TINY, "depth": 4, "hidden_size": 256, "cap_feat_dim": 64, "num_heads": 4}
GRIDS, TEXTS = ((16, 16), (8, 24), (5, 5), (20, 3)), (20, 7, 1, 30)
TINY_GRIDS, TINY_TEXTS = ((4, 4), (2, 6), (1, 1), (5, 3)), (5, 7, 3, 1)
KINDS = torch.tensor([0, 2, 1, 2])
STEPS, PACKS = 2, 2


def zero_stages(case: Case) -> Result:
    """Losses and weights of a few steps under every ZeRO stage, then one more step from the checkpoint of the stage before."""
    figures: dict[str, Any] = {}
    bounds: dict[str, float] = {}
    expected: dict[str, bool] = {}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        expected["the process group is on the device"] = ranks.device.type == case.device.type
        for precision, bound in case.size((("fp32", 1e-4), ("bf16", 2e-2)), (("bf16", 2e-2),)):
            first: dict[str, Any] | None = None
            found: Checkpoint | None = None
            for stage in case.size((0, 1, 2, 3), (0, 3)):
                report, saved = _run_stage(case, ranks, stage, precision, Path(folder) / f"{precision}-{stage}", resumed=found)
                first, found = first or report, Checkpoint(saved, checkpoint.check(saved))
                label = f"{precision} ZeRO {stage}"
                figures |= {f"{label} last loss": report["losses"][-1], f"{label} grad norm": report["norms"][-1]}
                expected[f"{label} applies every step"] = report["applied"]
                if stage == 0:
                    continue
                losses = relative_error(torch.tensor(report["losses"]), torch.tensor(first["losses"]))
                figures |= {f"{label} losses": losses, f"{label} weights": relative_error(report["weights"], first["weights"])}
                figures[f"{label} resumed"] = abs(report["resumed"] / first["next"] - 1)
                bounds |= {f"{label} {part}": bound for part in ("losses", "weights", "resumed")}
    return Result(figures, bounds, expected)


def _run_stage(
    case: Case, ranks: Ranks, stage: int, precision: str, folder: Path, *, resumed: Checkpoint | None
) -> tuple[dict[str, Any], Path]:
    """Steps from the initial weights, saved; then the loss of one more step, here and from `resumed`, that of another stage."""
    engine = _engine(case, ranks, stage, precision)
    results = [_step(case, engine, step, precision=precision) for step in range(STEPS)]
    part = Part(engine.shapes, {"weights": engine.fragments(), **engine.moments()})
    saved = save(folder, CheckpointMetadata(step=STEPS, world_size=ranks.size, config_hash=""), part, ranks=ranks)
    weights = checkpoint.consolidate(saved, ema=False)
    report: dict[str, Any] = {
        "losses": [loss for loss, _, _ in results],
        "norms": [norm for _, norm, _ in results],
        "applied": all(applied for _, _, applied in results),
        "weights": list(weights.values()),
        "next": _two_losses(case, engine, precision),
    }
    engine.close()
    if resumed is not None:
        engine = _engine(case, ranks, stage, precision)
        engine.load(resumed.pieces, updates=STEPS)
        report["resumed"] = _two_losses(case, engine, precision)
        engine.close()
    return report, saved


def _engine(case: Case, ranks: Ranks, stage: int, precision: Any) -> Engine:
    return Engine(case.network(case.size(SMALL, TINY), std=0.05), ranks=ranks, stage=stage, precision=precision, weight_decay=0.1)


def _two_losses(case: Case, engine: Engine, precision: str) -> float:
    """Sum of the losses of two steps: the second tells whether the moments were loaded."""
    return sum(_step(case, engine, STEPS + step, precision=precision)[0] for step in range(2))


def _step(case: Case, engine: Engine, step: int, *, precision: str) -> tuple[float, float, bool]:
    """A step of some packs, as the trainer takes it. Returns loss, gradient norm, and whether it was applied."""
    derivative = "fp16" if case.on_gpu and precision == "bf16" else "fp32"
    objective = TransitionObjective(transports.make("ot_fm"), patch_size=1, derivative_precision=derivative)
    total = 0.0
    for number in range(PACKS):
        inputs, draws = _inputs(case, seed=1000 * step + 100 * number)
        losses = objective(engine, inputs.latents, inputs.text, noise=inputs.noise, **draws, derivative_network=engine.module)
        engine.accumulate(losses.loss, count=PACKS * len(KINDS))
        total += float(losses.raw.sum())
    result = engine.step(lr=1e-3)
    return total, result.grad_norm, result.applied


def _inputs(case: Case, *, seed: int) -> tuple[Inputs, dict[str, Any]]:
    inputs = case.pack(case.size(SMALL, TINY), case.size(GRIDS, TINY_GRIDS), case.size(TEXTS, TINY_TEXTS), seed=seed)
    uniforms = torch.rand(len(KINDS), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return inputs, {"kinds": KINDS, "uniforms": uniforms, "weights": torch.ones(len(KINDS))}
