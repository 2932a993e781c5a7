"""Previews: the same images for any number of ranks and every ZeRO stage, and a training that does not notice them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.distributed.ranks import Ranks
from launch.training.metrics import read_rows
from tests.distributed import jobs, preview_worker

LAYOUTS = {1: ("0", "1", "2"), 2: ("0", "1", "2", "3"), 4: ("3", "1")}  # stages by number of ranks
OTHER_LAYOUTS = {1: ("3",), 4: ("0", "2")}
CONFIG = """\
plan: {max_tokens: 64, tokens_per_pack: 128, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 6, lr: 1.0e-3, ema: 0.5}
loader: {workers: 0}
checkpoint: {every: 3}
log: {every: 1}
"""
PREVIEW = "preview={every: 2, prompts: [a red circle, a blue cross], sizes: [32x16], steps: [1, 2]}"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, alone: Ranks) -> Path:
    """Previews of one average, and reports of what they changed, for all layouts."""
    folder = tmp_path_factory.mktemp("previews")
    for stage in LAYOUTS[1]:
        report = preview_worker.draw(preview_worker.config_of(folder / f"1-{stage}", f"train.zero={stage}"), alone)
        (folder / f"1-{stage}" / "0.json").write_text(json.dumps(report))
    for ranks in (2, 4):
        broken = ["3-broken"] * (ranks == 2)
        jobs.run_ranks("tests.distributed.preview_worker", str(folder), *LAYOUTS[ranks], *broken, log=folder / "log", ranks=ranks)
    return folder


def test_images_do_not_depend_on_ranks_and_stage(drawn: Path) -> None:
    first = pixels(drawn / "1-0" / "previews" / "step-000004.png")
    assert len(np.unique(first)) > 100
    for ranks, stages in LAYOUTS.items():
        for stage in stages:
            other = pixels(drawn / f"{ranks}-{stage}" / "previews" / "step-000004.png")
            assert np.abs(other - first).max() <= 1, (ranks, stage)


@pytest.mark.soak
def test_nor_do_they_in_the_other_layouts(drawn: Path) -> None:
    first = pixels(drawn / "1-0" / "previews" / "step-000004.png")
    for ranks, stages in OTHER_LAYOUTS.items():
        jobs.run_ranks("tests.distributed.preview_worker", str(drawn), *stages, log=drawn / "log", ranks=ranks)
        for stage in stages:
            assert np.abs(pixels(drawn / f"{ranks}-{stage}" / "previews" / "step-000004.png") - first).max() <= 1, (ranks, stage)


def test_a_rank_that_cannot_decode_costs_the_preview_only(drawn: Path) -> None:
    """Under ZeRO 3, where the other ranks wait for this one's layers."""
    for rank in range(2):
        report = json.loads((drawn / "2-3-broken" / f"{rank}.json").read_text())
        assert report["lines"] == ["warning: no preview of step 4: MemoryError: no room to decode; the run goes on"]
        assert report["unchanged"]
        assert report["training"]
    assert list((drawn / "2-3-broken" / "previews").iterdir()) == []


def test_weights_average_and_random_state_come_back_bit_by_bit(drawn: Path) -> None:
    for ranks, stages in LAYOUTS.items():
        for stage in stages:
            for rank in range(ranks):
                report = json.loads((drawn / f"{ranks}-{stage}" / f"{rank}.json").read_text())
                assert report["passed"] == [False, True]
                assert report["unchanged"], (ranks, stage, rank)
                assert report["in_place"]
                assert report["training"]
                assert [line.startswith("preview of step 4: 12 images in ") for line in report["lines"]] == [True] * (rank == 0)


def test_what_goes_wrong_is_a_warning(tmp_path: Path, alone: Ranks) -> None:
    def attempt(name: str, *overrides: str, stop: bool = False) -> tuple[list[str], list[int], Path]:
        folder, lines, shown = tmp_path / name, [], []
        previews = preview_worker.make_previews(preview_worker.config_of(folder, "train.zero=0", *overrides), alone)
        previews.log, previews.show = lines.append, lambda image, step: shown.append(step)
        if name == "full":
            (folder / "previews").write_text("in the way")
        assert previews.draw_if_due(4, stopping=lambda: stop)
        previews.engine.close()
        return lines, shown, folder / "previews" / "step-000004.png"

    (late, done), shown, path = attempt("late", "preview.minutes=1e-9")
    why = "preview.minutes=1e-09 is over: give fewer prompts, sizes or steps, or more minutes"
    assert late == f"warning: preview of step 4: 11 of 12 images left out, {why}"
    assert (done.startswith("preview of step 4: 1 image in "), shown, path.is_file()) == (True, [4], True)

    (warning,), shown, path = attempt("full")
    assert warning.startswith(f"warning: the preview of step 4 was not written: {path}: ")
    assert warning.endswith("; the run goes on")
    assert shown == [4]

    assert attempt("stopped", stop=True)[:2] == ([], [])

    (warning,), shown, _ = attempt("codec", "codec={kind: sd-vae, path: nowhere}", "preview.sizes=[32x32]")
    assert warning.startswith("warning: no preview of step 4: ")
    assert shown == []


def test_a_preview_that_ended_the_run_is_not_tried_again(tmp_path: Path, alone: Ranks) -> None:
    folder = tmp_path / "previews"

    def attempt(*overrides: str, stopping: Callable[[], bool] = lambda: False) -> list[str]:
        previews, lines = preview_worker.make_previews(preview_worker.config_of(tmp_path, "train.zero=0", *overrides), alone), []
        previews.log = lines.append
        try:
            assert previews.draw_if_due(4, stopping=stopping)
        finally:
            previews.engine.close()
        return lines

    def fail(error: type[BaseException]) -> bool:
        raise error

    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C
        attempt(stopping=lambda: fail(KeyboardInterrupt))
    assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        attempt(stopping=lambda: fail(ZeroDivisionError))
    unfinished = folder / "step-000004.unfinished"
    why = f"the run ended while it was drawn; to try again, remove {unfinished}"
    assert attempt() == [f"warning: no preview of step 4: {why}"]
    (line,) = attempt("preview.seed=1")
    assert line.startswith("preview of step 4: 12 images in ")
    assert [path.name for path in folder.iterdir()] == ["step-000004.png"]

    assert attempt("preview.seed=1") == []
    before = (folder / "step-000004.png").read_bytes()
    (line,) = attempt("preview.seed=2")
    assert line.startswith("preview of step 4: ")
    assert (folder / "step-000004.png").read_bytes() != before


def test_previews_of_a_training_that_went_another_way_are_drawn_again(tmp_path: Path, figures: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)

    def run(*overrides: str) -> tuple[bytes, bytes]:
        paths = [f"corpus={figures}", f"run_dir={tmp_path / 'run'}"]
        arguments = [str(tmp_path / "run.yaml"), *paths, PREVIEW, "checkpoint.every=2", "train.steps=4", *overrides]
        jobs.run_ranks("launch.cli", "train", *arguments, log=tmp_path / "log", ranks=1)
        first, second = (tmp_path / "run" / "previews" / f"step-{step:06d}.png" for step in (2, 4))
        return first.read_bytes(), second.read_bytes()

    first, second = run()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")  # as if killed before it was saved
    again, other = run("train.lr=2.0e-3")
    assert again == first
    assert other != second


def test_images_are_those_of_the_average_as_it_samples_after_export(tmp_path: Path, figures: Path) -> None:
    """The last preview of a run shows what its model folder draws."""
    from tim import Generator

    (tmp_path / "run.yaml").write_text(CONFIG)
    arguments = [f"corpus={figures}", f"run_dir={tmp_path / 'run'}", "train.steps=2", PREVIEW]
    jobs.run_ranks("launch.cli", "train", str(tmp_path / "run.yaml"), *arguments, log=tmp_path / "log", ranks=1)
    shown = tmp_path / "run" / "previews" / "step-000002.png"
    image = Generator.from_pretrained(tmp_path / "run" / "model")("a blue cross", height=16, width=32, steps=2, seed=0)[0]
    grid = pixels(shown)
    enlarged = np.asarray(image.resize((160, 80), Image.Resampling.NEAREST)).astype(int)
    windows = [grid[top : top + 80, left : left + 160] for top in range(grid.shape[0] - 79) for left in (grid.shape[1] - 172,)]
    assert min(np.abs(window - enlarged).max() for window in windows) <= 1


def test_training_does_not_notice_previews_and_a_resumed_run_repeats_none(tmp_path: Path, figures: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)

    def run(name: str, *overrides: str) -> Path:
        arguments = [f"corpus={figures}", f"run_dir={tmp_path / name}", *overrides]
        jobs.run_ranks("launch.cli", "train", str(tmp_path / "run.yaml"), *arguments, log=tmp_path / f"{name}.log")
        return tmp_path / name

    without, with_previews = run("without", "train.zero=3"), run("with", "train.zero=3", PREVIEW, "train.steps=4")
    previews = with_previews / "previews"
    assert sorted(path.name for path in previews.iterdir()) == ["step-000002.png", "step-000004.png"]

    shutil.rmtree(with_previews / "checkpoints" / "step-000004")  # as if killed before it was saved
    before = {path: path.stat().st_mtime_ns for path in previews.iterdir()}
    (previews / "step-000002.png").unlink()
    run("with", "train.zero=3", PREVIEW)
    assert sorted(path.name for path in previews.iterdir()) == ["step-000004.png", "step-000006.png"]
    assert (previews / "step-000004.png").stat().st_mtime_ns == before[previews / "step-000004.png"]
    assert "preview of step 6: 4 images in " in (tmp_path / "with.log").read_text()

    of_steps = ("step", "loss", "lr", "grad_norm", "images", "tokens", "fill", "ids_digest")  # and not of the machine
    columns = [name for name in read_rows(without / "metrics.jsonl")[0] if name in of_steps or name.startswith("loss_")]
    assert jobs.story(with_previews, columns=columns) == jobs.story(without, columns=columns)
