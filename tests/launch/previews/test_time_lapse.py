"""`tim preview`: an animation over the previews of a run, and over its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence

from launch.checkpoints import checkpoint
from launch.checkpoints.export import spec_of
from launch.checkpoints.saving.background import Part
from launch.checkpoints.tensor_fragments import Fragment
from launch.cli import main
from launch.config.load import load_config
from launch.previews.cells import Cell, drawing_order, preview_grid
from tests.launch.checkpoints.writing import save_parts
from tim import TransitionTransformer

CONFIG = """\
network: {params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 9}
"""
PREVIEW = "preview: {prompts: [a red circle], sizes: [16x24], steps: [1, 2]}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 6, and a preview of step 3."""
    folder = tmp_path / "run"
    (folder / "previews").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG + PREVIEW)
    spec = spec_of(load_config(folder / "config.yaml"))
    for step in (3, 6):
        torch.manual_seed(step)
        network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        weights = {name: value.detach() for name, value in network.named_parameters()}
        pieces = {"ema": {name: Fragment(0, value.flatten().clone()) for name, value in weights.items()}}
        part = Part({name: tuple(value.shape) for name, value in weights.items()}, pieces)
        save_parts(folder, checkpoint.CheckpointMetadata(step=step, world_size=1, config_hash=""), [part])
    Image.new("RGB", (90, 60), "blue").save(folder / "previews" / "step-000003.png")
    return folder


def frames(path: Path) -> list[Image.Image]:
    with Image.open(path) as animation:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]


def test_previews_and_checkpoints_without_one_are_the_frames(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(run), "--json"]) == 0
    file = run / "previews" / "time-lapse.webp"
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "steps": [3, 6], "drawn": [6]}
    first, second = frames(file)
    assert first.size == second.size
    assert first.getpixel((45, 60)) == pytest.approx((0, 0, 255), abs=8)
    assert len(second.getcolors(1 << 16) or []) > 50
    with Image.open(run / "previews" / "step-000006.png") as drawn:  # kept for the next time
        assert json.loads(drawn.info["prompts"]) == ["a red circle"]
    assert not list(run.glob("preview-*"))

    gif = run.parent / "out" / "run.gif"
    assert main(["preview", str(run), "--out", str(gif), "--prompt", "another", "--size", "8x8", "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == [3, 6]
    assert len(frames(gif)) == 2
    assert sorted(path.name for path in (run / "previews").glob("*.png")) == ["step-000003.png", "step-000006.png"]


def test_what_cannot_be_shown_is_an_error_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["preview", str(run), *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err.strip()

    assert error("--out", "a.mp4") == "error: --out a.mp4: give a file that ends with .webp or .gif"
    assert "preview.prompts.0: got class 3, but the model takes text" in error("--class", "3")
    assert "the nearest size is 24x16" in error("--size", "23x17")
    (run / "config.yaml").write_text(CONFIG)
    (run / "previews" / "step-000003.png").unlink()
    assert error().endswith("it has no previews: give --prompt (or --class) and --size")


def test_missing_images_are_grey_and_cheap_ones_come_first() -> None:
    cells = [Cell(prompt, 160, 200, steps) for prompt in ("a", 7) for steps in (1, 8)]
    assert drawing_order([*cells, Cell("b", 8, 8, 8)]) == [0, 2, 4, 1, 3]
    grid = preview_grid(cells, {0: Image.new("RGB", (200, 160), "red")})
    colours = {colour: count for count, colour in grid.getcolors(1 << 16) or []}
    assert colours[(255, 0, 0)] == 200 * 160
    assert colours[(225, 225, 225)] >= 3 * 200 * 160
