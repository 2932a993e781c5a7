"""The recipe `photos` in short: real photographs, two processes, ZeRO-2, killed in the middle and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from launch.cli import main
from tests.distributed import jobs

PHOTOS = 24
SHORT = [
    "network.params.depth=2",
    "network.params.hidden_size=64",
    "network.params.num_heads=2",
    "plan.packs_per_step=2",
    "train.steps=6",
    "train.warmup=2",
    "checkpoint.every=2",
    "log.every=1",
    "loader.workers=1",
]
COLUMNS = ["step", "ids_digest", "loss", "loss_diffusion", "loss_transition", "grad_norm", "lr", "images", "tokens", "fill", "first_ids"]


@pytest.fixture(scope="module")
def corpus(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the photographs, prepared."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "source").mkdir()
    names = sorted(path.name for path in (shared / "corpora" / "photos").glob("*.JPEG"))[:PHOTOS]
    for name in names:
        (folder / "source" / name).symlink_to((shared / "corpora" / "photos" / name).resolve())
    captions = (shared / "corpora" / "photos" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "source" / "metadata.jsonl").write_text("".join(line for line in captions if any(f'"{name}"' in line for name in names)))
    counts = prepare([str(folder / "source")], out=folder / "corpus", config=PrepareConfig())
    assert counts.kept > PHOTOS / 2
    return folder / "corpus"


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(corpus: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    command = ["photos", f"corpus={corpus}", *SHORT]
    job = jobs.start("launch", "--nproc-per-node", "2", *command, f"run_dir={broken}", log=log)
    jobs.wait_for_row(broken, 3, job, log=log)
    started = log.read_text().rpartition("\n")[0]  # what helpers of a killed process print is not its own
    assert jobs.kill_and_watch(job) == []
    assert jobs.foreign_lines(started) == []
    assert not (broken / "model").exists()
    jobs.run_ranks("launch.cli", "train", *command, f"run_dir={broken}", log=log)
    jobs.run_ranks("launch.cli", "train", *command, f"run_dir={unbroken}", log=tmp_path / "whole")
    assert jobs.foreign_lines((tmp_path / "whole").read_text()) == []

    assert "continuing from" in log.read_text()
    assert jobs.story(broken, columns=COLUMNS) == jobs.story(unbroken, columns=COLUMNS)
    assert [row[0] for row in jobs.story(broken, columns=COLUMNS)] == list(range(1, 7))
    assert (broken / "model" / "model.safetensors").read_bytes() == (unbroken / "model" / "model.safetensors").read_bytes()
    assert (broken / "latest").read_text() == "step-000006\n"

    images = tmp_path / "pictures"
    sizes = ["--size", "512x128,128x512,256x256", "--steps", "1"]
    assert main(["sample", str(broken), "--prompt", "a photo of a hen", *sizes, "--out", str(images)]) == 0
    assert {Image.open(path).size for path in images.glob("*.png") if path.name != "grid.png"} == {(512, 128), (128, 512), (256, 256)}
