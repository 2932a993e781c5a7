"""`tim eval` in the background of a training of two ranks: killed, repeated, in the metrics and in the model card."""

from __future__ import annotations

import json
import time
from pathlib import Path

from launch.checkpoints.evaluation_results import evaluation_folder
from launch.plots.curves import read_curves
from launch.training.metrics import last_row, read_rows
from tests.distributed import jobs
from tests.processes import is_running

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 32, packs_per_step: 2}
text: {max_tokens: 16}
network:
  params: {patch_size: 16, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2}
checkpoint: {every: 1, keep_last: 1}
eval: {every: 2, images: 16, steps: [1], metrics: [frechet]}
loader: {workers: 0}
log: {every: 1}
"""


def processes_of(run_dir: Path) -> list[int]:
    """Processes whose command names the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(run_dir / "evaluations") in words and is_running(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def test_a_killed_evaluation_is_repeated_and_reported(figures: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = tmp_path / "run.yaml"
    config.write_text(f"corpus: {figures}\nrun_dir: {run}\n{CONFIG}")
    job = jobs.start_ranks("launch.cli", "train", str(config), log=log)
    deadline = time.monotonic() + jobs.PATIENCE
    while not processes_of(run):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    job.kill()
    while processes_of(run):
        assert time.monotonic() < deadline + 10, "an orphan"
        time.sleep(0.05)

    jobs.run_ranks("launch.cli", "train", str(config), log=log)
    rows = read_rows(run / "metrics.jsonl")
    (late,) = [row for row in rows if row.get("eval/step") == 2]
    assert (late["step"], late["images"]) == (2, last_row(run / "metrics.jsonl")["images"])  # pyright: ignore[reportOptionalSubscript]
    result = json.loads((evaluation_folder(run, 2) / "eval.json").read_text())
    (value,) = [row["value"] for row in result["rows"] if row["bin"] == "all" and row["metric"] == "frechet"]
    assert late["eval/frechet_pixels/steps1"] == value
    assert list(read_curves([run], columns=["eval"], axis="images")) == ["eval/frechet_pixels/steps1"]
    card = (run / "model" / "README.md").read_text()
    assert f"| frechet (pixels), lower is better | {value:.4g} [" in card
    assert not list((run / "evaluations").glob("*/model"))
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert "evaluated step 2 in" in log.read_text()
    assert processes_of(run) == []
