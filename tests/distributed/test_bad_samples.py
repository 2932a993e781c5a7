"""Two ranks leave out samples that make the loss non-finite, at every stage the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.config.load import load_config
from launch.guards.bad_samples import FILE
from launch.training.planning import make_planner
from tests.distributed import jobs
from tests.launch.guards.test_bad_samples import write_run

BAD = ("corpus/0000000003", "corpus/0000000006")


def test_every_stage_leaves_out_the_same_samples(tmp_path: Path) -> None:
    config, log = write_run(tmp_path, bad=(3, 6)), tmp_path / "log"
    planner = make_planner(load_config(config))
    expected = [(step, id) for step in (1, 2, 3) for id in sorted(planner.next_step().ids) if id in BAD]
    assert expected
    losses = []
    for stage in (1, 3):
        run = tmp_path / f"run-{stage}"
        jobs.run_ranks("launch.cli", "train", str(config), f"run_dir={run}", f"train.zero={stage}", log=log)
        rows = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
        assert sorted((row["step"], row["id"]) for row in rows) == expected
        [*_, last] = jobs.story(run, columns=("bad_samples", "failed", "skipped_steps"))
        assert last == [len(expected), len(expected), 0]
        losses.append([row[0] for row in jobs.story(run, columns=["loss"])])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert log.read_text().count(f"; see {FILE}") == 2 * len({step for step, _ in expected})
