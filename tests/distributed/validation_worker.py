"""Run by test_validation.py on any number of ranks: the validation losses of a checkpoint, and the metrics of the step after it."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.history import History
from launch.config.load import load_config
from launch.distributed.ranks import Ranks, process_group
from launch.training.build import build
from launch.training.planning import make_planner
from launch.training.trainer import Trainer


def measured(config_file: str, stage: int, ranks: Ranks) -> dict[str, Any]:
    """The columns, and whether weights and average are as before."""
    config = load_config(config_file, overrides=[f"train.zero={stage}"])
    assert config.run_dir is not None
    with ExitStack() as cleanup:
        found = checkpoint.find(config.run_dir, step=2)
        trainer = Trainer(config, build(config, make_planner(config), ranks=ranks, cleanup=cleanup, found=found), ranks=ranks)
        trainer.resume(found, recorded=History(), replan=False)
        engine, average = trainer.parts.engine, trainer.parts.ema.average
        held = [fragment.values for fragments in (engine.fragments(), average) for fragment in fragments.values()]
        before = [values.clone() for values in held]
        columns = trainer.validate(last=True, stopping=bool)
        again = trainer.validate(last=True, stopping=bool)
        same = all(torch.equal(one, other) for one, other in zip(before, held, strict=True))
        measure = trainer.take_step()
        row = {**trainer.row(measure), "flops": measure.flops}
        return {"columns": columns, "again": columns == again, "restored": ranks.gather(same), "next_row": row}


def main() -> None:
    config_file, out, *stages = sys.argv[1:]
    with process_group() as ranks:
        reports = {stage: measured(config_file, int(stage), ranks) for stage in stages}
        if ranks.is_main:
            Path(out).write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
