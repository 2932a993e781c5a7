"""`tim eval` end to end, on networks with random weights: the corpus is drawn by one of them, so that it is the better model."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
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
from launch.evaluation.store import Setting
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
    """`a`, `b`, `classes`: models; `corpus`: images drawn by `a`, with captions of figures; `labelled`: with classes in place of captions;
    `partly silent`: some without a caption."""
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
    silent = PrepareConfig.model_validate({"images": {"format": "png"}, "dedup": {"near": "off"}, "captions": {"required": False}})
    labels = [{"label": number % 3} for number in range(40)]
    texts = [{"text": captions[number]} if number < 30 else {} for number in range(40)]
    for name, described in (("labelled", labels), ("partly silent", texts)):
        source = folder / f"{name} images"
        shutil.copytree(folder / "images", source)
        lines = [json.dumps({"file_name": f"{number:03d}.png", **each}) + "\n" for number, each in enumerate(described)]
        (source / "metadata.jsonl").write_text("".join(lines))
        prepare([str(source)], out=folder / name, config=silent, workers=1)
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
    assert done["model"] == {"path": str(folder / "a"), "digest": done["model"]["digest"], "loras": []}
    assert done["machine"].keys() == {"device", "dtype", "tim", "torch"}
    assert (done["resamples"], done["max_pixels"], done["clip"], list(done["extractors"])) == (16, None, None, ["pixels"])
    rows = done["rows"]
    bins = dict.fromkeys(row["bin"] for row in rows)
    assert next(iter(bins)) == "all"
    assert {name.partition(" ")[0] for name in bins} == {"all", "size", "aspect"}
    assert {row["metric"] for row in rows} == {"frechet", "kernel", "sliced", "precision", "recall", "accuracy"}
    for division in ("size", "aspect"):
        counts = {row["bin"]: row["images"] for row in rows if row["bin"].startswith(division)}
        assert len(counts) > 1
        left_out = [int(each) for line in done["warnings"] for each in re.findall(rf"{division} [^(,]+ \((\d+)\)", line)]
        assert sum(counts.values()) + sum(left_out) == IMAGES
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert len(rows) == len({(row["metric"], row["bin"], row["steps"], row["guidance"]) for row in rows}) == 6 * 4 * len(bins)
    assert "80 images are few" in done["warnings"][0]
    assert done["memorised"]["training_images"] == 90
    reference = {row["bin"]: row for row in done["reference"]}
    assert set(reference) == set(bins)
    assert {(row["metric"], row["steps"], row["guidance"]) for row in done["reference"]} == {("accuracy", None, None)}
    assert "| figures as in the prompt ↑ |" in (tmp_path / "out" / "eval.md").read_text()
    assert "real: scores of the real images." in (tmp_path / "out" / "eval.md").read_text()
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
    identity = tmp_path / "out" / "evaluation.json"
    older = {key: value for key, value in json.loads(identity.read_text()).items() if key != "format"}
    for content, said in ((older, "has an evaluation with another format"), ([], "evaluation.json is damaged (not a JSON object)")):
        identity.write_text(json.dumps(content))
        refused = run(*arguments(folder, images=20, steps="1"), "--metrics", "frechet")
        assert (refused["code"], said in refused["error"]) == (2, True)


def test_a_folder_in_use_is_refused(folder: Path, run: Run, tmp_path: Path) -> None:
    typed = [*arguments(folder, images=20, steps="1"), "--metrics", "frechet"]
    assert run(*typed)["code"] == 0
    unfinished = tmp_path / "out" / "features" / "steps1-guidance1-00000.safetensors.host-1.tmp"
    unfinished.write_bytes(b"")
    with open(tmp_path / "out" / "features" / "lock", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = run(*typed)
        assert (refused["code"], unfinished.exists()) == (1, True)
        assert "another evaluation is writing there; wait for it, or give another --out" in refused["error"]
    assert run(*typed)["code"] == 0
    assert not unfinished.exists()


def test_several_processes_print_an_error_once(folder: Path, tmp_path: Path) -> None:
    job = in_background(folder, tmp_path / "out", "--processes", "2", "--images", "1000")
    out, said = job.communicate()
    assert job.returncode == 2
    message = f"--images 1000: {folder / 'corpus'} has 100 samples that the model draws"
    assert [line for line in said.splitlines() if "error" in line] == [f"error: {message}"]
    assert json.loads(out) == {"error": message, "exit": 2}


def test_samples_without_a_caption_are_left_out(folder: Path, run: Run) -> None:
    done = run(folder / "a", "--corpus", folder / "partly silent", "--steps", "1", "--metrics", "frechet", "--resamples", "8")
    assert done["code"] == 0, done
    assert done["images"] == 30


def test_a_model_of_classes(folder: Path, run: Run, tmp_path: Path) -> None:
    done = run(folder / "classes", "--corpus", folder / "labelled", "--steps", "1,2", "--resamples", "8")
    assert done["code"] == 0, done
    assert (done["images"], {row["metric"] for row in done["rows"]}) == (40, {"frechet", "kernel", "sliced", "precision", "recall"})
    assert [each["outcome"] for each in done["verdicts"]]
    assert (tmp_path / "out" / "grid.png").is_file()


def test_sizes_are_said(folder: Path, run: Run, tmp_path: Path) -> None:
    """A model without a run draws as large as the real images are; a config.yaml above it may be of something else."""
    typed = ["--images", "20", "--steps", "1", "--metrics", "frechet", "--resamples", "8"]
    (tmp_path / "config.yaml").write_text("of: something else\n")
    shutil.copytree(folder / "a", tmp_path / "models" / "a")
    done = run(tmp_path / "models" / "a", "--corpus", folder / "corpus", *typed)
    assert done["code"] == 0, done
    assert "sizes: 20x20 to 48x32, in all " in done["said"]
    assert "warning: models/a does not say at which sizes it was trained" in done["said"].replace(f"{tmp_path}/", "")
    limited = run(tmp_path / "models" / "a", "--corpus", folder / "corpus", "--max-pixels", "600", *typed, out="limited")
    assert "warning: " not in limited["said"].replace("warning: 20 images", "")


def test_settings_that_differ_have_different_files() -> None:
    guidances = (1.0, 1.0000001, 1.25, 1e22)
    assert len({Setting(4, guidance).name for guidance in guidances}) == len(guidances)
    assert [Setting(4, guidance).name for guidance in (1.0, 1.25)] == ["steps4-guidance1", "steps4-guidance1.25"]


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
    keys = {"max_pixels", "seed", "resamples", "features", "extractors", "clip", "reference", "summary", "verdicts", "memorised"}
    assert done.keys() >= keys, "the keys of every eval.json"
    assert "48 images are few" in done["warnings"][0]
    exact = rng.standard_normal((64, 8)) + 1e6
    np.save(tmp_path / "exact.npy", exact)
    doubles = run("--real-features", tmp_path / "exact.npy", "--generated-features", tmp_path / "exact.npy", "--metrics", "fid,sliced")
    assert all(row["value"] < 1e-6 for row in doubles["rows"])
    for name, wrong, said in (
        ("nan", np.where(np.eye(64, 8) > 0, np.nan, 1.0), "8 of 64 rows are not finite, the first is row 0"),
        ("few", np.ones((7, 8)), "has 7 rows; an interval needs at least 8 images"),
        ("wide", np.ones((64, 9)), "rows of 9 and 8 values; use one extractor for both"),
        ("whole", np.ones((64, 8), dtype=np.int64), "is int64 (64, 8); expected a matrix of floats"),
        ("objects", np.array([None] * 8), "not features of images"),
    ):
        np.save(tmp_path / f"{name}.npy", wrong)
        refused = run("--real-features", tmp_path / f"{name}.npy", *files[2:])
        assert (refused["code"], refused["error"].count(f"{name}.npy"), said in refused["error"]) == (2, 1, True), refused
    assert "leave out --guidance" in run(*files, "--guidance", "2")["error"]
    assert "leave out --save-images" in run(*files, "--save-images")["error"]
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
    (["{a}", "--corpus", "{labelled}"], "has no caption, but the model draws captions: give a corpus with captions"),
    (["{a}", "--corpus", "{corpus}", "--steps", "0"], "--steps 0: sampling needs at least 1 step"),
    (["{a}", "--corpus", "{corpus}", "--steps", "1000000000"], "steps"),
    (["{corpus}", "--corpus", "{corpus}"], "{corpus}"),
    (["{classes}", "--corpus", "{corpus}"], "has no class, but the model draws classes: give a corpus with classes"),
    (["--compare", "{a}", "{classes}", "--corpus", "{corpus}"], "--compare: one of the models draws captions, the other one classes"),
    (["{a}", "--compare", "{a}", "{a}", "--corpus", "{corpus}"], "expected MODEL, or --compare MODEL MODEL: both were given"),
    (["{a}", "--corpus", "{corpus}", "--device", "cpu", "--processes", "2"], "--device cpu is for one process"),
]


@pytest.mark.parametrize(("typed", "message"), WRONG, ids=[" ".join(typed)[-40:] for typed, _ in WRONG])
def test_wrong_usage_is_one_line_and_leaves_nothing(folder: Path, run: Run, tmp_path: Path, typed: list[str], message: str) -> None:
    names = {name: str(folder / name) for name in ("a", "classes", "corpus", "labelled")}
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
    assert given["compare"] == ("a", "b")
