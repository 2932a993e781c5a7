"""`tim eval` end to end, on networks with random weights: the corpus is drawn by one of them, so that it is the better model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command

from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import figures
from launch.cli import app, main
from launch.command_options import typed_again
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import TINY_CLASSES, tiny_network
from tim import Generator
from tim.model_folder.folder import save_model

Run = Callable[..., dict[str, Any]]
SIZES = ((24, 24), (16, 40), (40, 16), (32, 48), (20, 20))
CORPUS_IMAGES, IMAGES = 100, 80
TABLE = {"eval.json", "eval.md", "eval.png", "grid.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b`: models; `corpus`: images drawn by `a`, with captions of figures."""
    folder = tmp_path_factory.mktemp("evaluation")
    network = tiny_network()
    save_model(folder / "a", network.state_dict(), SPEC)
    other = {name: value if "final" not in name else 3 * value for name, value in network.state_dict().items()}
    save_model(folder / "b", other, SPEC)
    save_model(folder / "classes", tiny_network(TINY_CLASSES).state_dict(), replace(SPEC, network=TINY_CLASSES, text=None))
    captions = [figure.caption for figure in figures()][:CORPUS_IMAGES]
    heights, widths = zip(*(SIZES[i % len(SIZES)] for i in range(CORPUS_IMAGES)), strict=True)
    images = Generator(network, SPEC)(captions, height=heights, width=widths, steps=2, seed=list(range(CORPUS_IMAGES)))
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "images" / f"{number:03d}.png")
    rows = [{"file_name": f"{number:03d}.png", "text": caption} for number, caption in enumerate(captions)]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PrepareConfig.model_validate({"images": {"format": "png"}, "dedup": {"near": "off"}})
    prepare([str(folder / "images")], out=folder / "corpus", config=config, workers=1)
    return folder


def arguments(folder: Path, *, model: str | None = "a", images: int = IMAGES, steps: str = "1,2", resamples: int = 16) -> list[str]:
    settings = ["--images", str(images), "--steps", steps, "--resamples", str(resamples), "--memorised", "0"]
    return [*([str(folder / model)] if model else []), "--corpus", str(folder / "corpus"), *settings]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The result of `tim eval … --json` into `out`, with what it said in `said`."""

    def evaluate(*typed: object, out: str = "out") -> dict[str, Any]:
        try:
            code = main(["eval", *map(str, typed), "--out", str(tmp_path / out), "--json"])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return {"code": code, **json.loads(said.out or "{}"), "said": said.err}

    return evaluate


def in_background(folder: Path, out: Path, *more: str, steps: str = "1,2") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "eval", *arguments(folder, steps=steps), "--out", str(out), "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def numbers(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "eval.json").read_text())["rows"]


def test_a_table_by_steps_size_and_aspect(folder: Path, run: Run, tmp_path: Path) -> None:
    done = run(*arguments(folder), "--memorised", "90", "--save-images", "--guidance", "1,2")
    assert done["code"] == 0, done
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*TABLE, "evaluation.json", "features", "images"}
    assert (done["images"], done["steps"], done["guidance"], done["format"]) == (IMAGES, [1, 2], [1.0, 2.0], 1)
    rows = done["rows"]
    bins = dict.fromkeys(row["bin"] for row in rows)
    assert next(iter(bins)) == "all"
    assert {name.partition(" ")[0] for name in bins} == {"all", "size", "aspect"}
    assert {row["metric"] for row in rows} == {"frechet", "kernel", "sliced", "precision", "recall", "accuracy"}
    for division in ("size", "aspect"):
        counts = {row["bin"]: row["images"] for row in rows if row["bin"].startswith(division)}
        assert len(counts) > 1
        left_out = [int(line.split()[-2]) for line in done["warnings"] if line.startswith(division)]
        assert sum(counts.values()) + sum(left_out) == IMAGES
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert len(rows) == len({(row["metric"], row["bin"], row["steps"], row["guidance"]) for row in rows}) == 6 * 4 * len(bins)
    assert "80 images are few" in done["warnings"][0]
    assert done["memorised"]["training_images"] == 90
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 4 * IMAGES
    with Image.open(tmp_path / "out" / "images" / "steps1-guidance1" / "00000.png") as image:
        assert image.size[::-1] in SIZES
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == {
        key: value for key, value in done.items() if key not in ("code", "said", "files")
    }


def test_the_model_that_drew_the_corpus_is_better(folder: Path, run: Run, tmp_path: Path) -> None:
    done = run("--compare", folder / "a", folder / "b", *arguments(folder, model=None, steps="2"), "--metrics", "frechet,kernel,accuracy")
    assert done["code"] == 0, done
    outcomes = {each["metric"]: each["outcome"] for each in done["differences"]}
    assert (outcomes["frechet"], outcomes["kernel"]) == ("worse", "worse")
    same = run("--compare", folder / "a", folder / "a", *arguments(folder, model=None, steps="2"), "--metrics", "frechet", out="same")
    assert [each["outcome"] for each in same["differences"]] == ["unclear"]
    assert "A is better" in (tmp_path / "out" / "compare.md").read_text()
    assert numbers(tmp_path / "same" / "a") == numbers(tmp_path / "same" / "b")


def test_a_killed_evaluation_and_two_processes_give_the_same_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    killed = in_background(folder, tmp_path / "killed", steps="1,60")
    deadline = time.monotonic() + 120
    chunks = tmp_path / "killed" / "features"
    while len(list(chunks.glob("steps*.safetensors"))) < 2 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    there = {path: path.stat().st_mtime_ns for path in chunks.glob("steps*.safetensors")}
    assert 2 <= len(there) < 4
    assert not (tmp_path / "killed" / "eval.json").exists()
    jobs = [
        in_background(folder, tmp_path / "killed", steps="1,60"),
        in_background(folder, tmp_path / "two", "--processes", "2", steps="1,60"),
    ]
    for job in jobs:
        out, said = job.communicate()
        assert job.returncode == 0, said
        assert json.loads(out)["images"] == IMAGES
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "two")
    assert (tmp_path / "killed" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()


def test_more_steps_are_added_and_another_evaluation_is_refused(folder: Path, run: Run, tmp_path: Path) -> None:
    run(*arguments(folder, images=20, steps="1"), "--metrics", "frechet")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").iterdir()}
    more = run(*arguments(folder, images=20, steps="1,2"), "--metrics", "frechet")
    assert more["steps"] == [1, 2]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = run(*arguments(folder, model="b", images=20, steps="1"), "--metrics", "frechet")
    assert other["code"] == 2
    assert "has an evaluation with another model; give another --out" in other["error"]


def test_features_that_were_supplied(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "real.npy", rng.standard_normal((64, 8)).astype(np.float32))
    save_file({"features": torch.from_numpy(rng.standard_normal((48, 8)) + 1)}, tmp_path / "generated.safetensors")
    files = ["--real-features", tmp_path / "real.npy", "--generated-features", tmp_path / "generated.safetensors"]
    done = run(*files, "--metrics", "fid,kid")
    assert done["code"] == 0, done
    found = {row["metric"]: row for row in done["rows"]}
    assert set(found) == {"fid", "kid"}
    assert 6 < found["fid"]["low"] < found["fid"]["value"] < 14
    assert (found["fid"]["images"], found["fid"]["steps"]) == (48, None)
    assert "not features of images" in run("--real-features", __file__, *files[2:])["error"]
    assert "--real-features and --generated-features: give both" in run(*files[:2])["error"]
    assert "leave out --corpus" in run(*files, "--corpus", "c")["error"]
    assert "is measured on images, not on features" in run(*files, "--metrics", "accuracy")["error"]


WRONG = [
    (["{a}"], "--corpus: missing"),
    (["--corpus", "{corpus}"], "expected MODEL, or --compare MODEL MODEL: neither was given"),
    (["{a}", "--corpus", "nowhere"], "nowhere is not a corpus"),
    (["{a}", "--corpus", "{corpus}", "--metrics", "fud"], "--metrics fud: unknown; choose from fid, kid"),
    (["{a}", "--corpus", "{corpus}", "--metrics", "fid"], "--metrics fid: FID needs features of inception: give --features inception=FILE"),
    (["{a}", "--corpus", "{corpus}", "--metrics", "clip_score"], "--metrics clip_score: needs a model: give --clip"),
    (["{a}", "--corpus", "{corpus}", "--metrics", "ocr"], "--metrics ocr: no prompt has quoted text"),
    (["{a}", "--corpus", "{corpus}", "--features", "resnet"], "resnet"),
    (["{a}", "--corpus", "{corpus}", "--images", "1000"], "--images 1000: {corpus} has 100 samples that the model draws"),
    (["{a}", "--corpus", "{corpus}", "--max-pixels", "3"], "no sample has a size that the model draws; raise --max-pixels"),
    (["{classes}", "--corpus", "{corpus}"], "has no class, but the model draws classes: give a corpus with classes"),
    (["--compare", "{a}", "{classes}", "--corpus", "{corpus}"], "--compare: one of the models draws captions, the other one classes"),
    (["{a}", "--compare", "{a}", "{a}", "--corpus", "{corpus}"], "expected MODEL, or --compare MODEL MODEL: both were given"),
    (["{a}", "--corpus", "{corpus}", "--device", "cpu", "--processes", "2"], "--device cpu is for one process"),
]


@pytest.mark.parametrize(("typed", "message"), WRONG, ids=[" ".join(typed)[-40:] for typed, _ in WRONG])
def test_wrong_usage_is_one_line_and_leaves_nothing(folder: Path, run: Run, tmp_path: Path, typed: list[str], message: str) -> None:
    names = {name: str(folder / name) for name in ("a", "classes", "corpus")}
    done = run(*(word.format(**names) for word in typed))
    assert done["code"] == 2, done
    assert message.format(**names) in done["error"]
    assert not (tmp_path / "out").exists()


def test_two_models_are_passed_on_to_several_processes() -> None:
    command = get_command(app).commands["eval"]  # pyright: ignore[reportAttributeAccessIssue]
    typed = ["--compare", "a", "b", "--corpus", "c", "--features", "pixels", "--features", "hf=x", "--save-images"]
    given = command.make_context("eval", [*typed]).params
    again = command.make_context("eval", typed_again(command.make_context("eval", [*typed]))).params
    assert again == given
    assert given["compare"] == (Path("a"), Path("b"))
