"""`tim sample` end to end, on a network with random weights: lists, resuming, repeating, edits, processes, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from launch.sampling.files.image_files import read_settings
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim.model_folder.folder import save_model

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "model"
    save_model(folder, tiny_network().state_dict(), SPEC)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The result of `tim sample MODEL … --json` into `out`, with what it said in `said`."""

    def sample(*arguments: object, out: str = "out", named: bool = True) -> dict[str, Any]:
        typed = [*([model] if named else []), *arguments, "--out", tmp_path / out, "--json"]
        try:
            main(["sample", *map(str, typed)])
        except SystemExit as ended:
            said = capsys.readouterr()
            return {"code": ended.code, **json.loads(said.out or "{}"), "said": said.err}
        said = capsys.readouterr()
        return {**json.loads(said.out), "code": 0, "said": said.err}

    return sample


def pixels(image: dict[str, Any]) -> np.ndarray:
    with Image.open(image["path"]) as opened:
        return np.asarray(opened.convert("RGB"), dtype=int)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_product_of_settings_and_pairs_of_them(run: Run) -> None:
    product = run("a fox", "🦊", "", "--size", "9x7,16x16", "--steps", "1,2", "--guidance", "1,2", "--seed", "3,4")
    settings = [tuple(image[key] for key in ("prompt", "width", "height", "steps", "guidance", "seed")) for image in product["images"]]
    assert len(set(settings)) == len(settings) == 3 * 2 * 2 * 2 * 2
    assert all(pixels(image).shape == (image["height"], image["width"], 3) for image in product["images"])
    assert len({Path(image["path"]).name.casefold() for image in product["images"]}) == 48
    zipped = run("a", "b", "c", "--zip", "--size", "8x8,8x8,9x9", "--steps", "1,2,2", "--count", "2", out="zip")
    settings = [tuple(image[key] for key in ("prompt", "width", "steps", "seed")) for image in zipped["images"]]
    assert settings == [("a", 8, 1, 0), ("a", 8, 1, 1), ("b", 8, 2, 0), ("b", 8, 2, 1), ("c", 9, 2, 0), ("c", 9, 2, 1)]


def test_rows_of_a_file_and_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a", "width": 7, "height": 9, "seed": 5}, {"prompt": "b", "steps": 3, "negative": "c", "guidance": 2}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("--prompts", tmp_path / "p.jsonl", "--size", "8x8", "--steps", "1")
    found = [tuple(image.get(key) for key in ("prompt", "width", "height", "seed", "steps", "negative")) for image in done["images"]]
    assert found == [("a", 7, 9, 5, 1, ""), ("b", 8, 8, 0, 3, "c")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"first\nsecond\n")))
    done = run("--prompts", "-", "--size", "8x8", "--steps", "1", out="stdin")
    assert [image["prompt"] for image in done["images"]] == ["first", "second"]


def test_steps_of_a_row_replace_the_times_of_the_command(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,steps\na,3\nb,\n")
    done = run("--prompts", tmp_path / "p.csv", "--size", "8x8", "--times", "1,0.5,0")
    assert [(image.get("steps"), image.get("times")) for image in done["images"]] == [(3, None), (None, [1.0, 0.5, 0.0])]


def test_a_folder_that_cannot_be_written_is_named_before_the_model_is_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for out, message in {"file": "file: is a file; give a folder", "file/below/it": "file is a file; give a folder"}.items():
        refused = run("missing", "a", "--size", "8x8", out=out, named=False)
        assert (refused["code"], message in refused["error"]) == (2, True), refused
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "closed").mkdir(mode=0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write anywhere
        assert "may not be written to; give another folder" in run("a", "--size", "8x8", out="closed/out")["error"]


def test_little_is_imported_to_draw_an_image(model: Path, tmp_path: Path) -> None:
    unneeded = ["transformers", "diffusers", "torchvision", "timm", "deepspeed", "accelerate", "pyarrow", "matplotlib", "rich", "dataprep"]
    unneeded += ["launch.distributed.supervisor", "pipeline.images.decode", "tim.integrations"]
    code = f"""
import sys
from launch.cli import main
main(["sample", {str(model)!r}, "a", "--size", "8x8", "--steps", "1", "--out", {str(tmp_path / "out")!r}])
print([name for name in {unneeded} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_what_is_there_stays_and_other_settings_get_other_names(run: Run, tmp_path: Path) -> None:
    first = run("a", "b", "--size", "8x8", "--steps", "1")
    assert (first["drawn"], len(first["images"])) == (2, 2)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out") if name.startswith("0")}
    again = run("a", "b", "--size", "8x8", "--steps", "1", "--seed", "0,1")
    assert again["drawn"] == 2
    assert "out: 2 of 4 images" in again["said"]
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before
    for setting in (["--negative", "x"], ["--interval", "0,0.5"], ["--times", "1,0"], ["--guidance", "2"], ["--stochasticity", "0.1"]):
        steps = [] if setting[0] == "--times" else ["--steps", "1"]
        assert run("a", "--size", "8x8", *steps, *setting)["drawn"] == 1, setting
    target = Path(first["images"][0]["path"])
    target.write_bytes(Path(first["images"][1]["path"]).read_bytes())
    refused = run("a", "--size", "8x8", "--steps", "1")
    assert refused["code"] == 2
    assert "exists with other settings or none: give another --out, or --overwrite" in refused["error"]
    assert run("a", "--size", "8x8", "--steps", "1", "--overwrite")["drawn"] == 1
    assert np.array_equal(pixels({"path": target}), pixels(run("a", "--size", "8x8", "--steps", "1", out="other")["images"][0]))


@pytest.mark.parametrize("form", ["png", "webp"])
def test_an_image_is_repeated_bit_by_bit(run: Run, tmp_path: Path, form: str) -> None:
    settings = ["--size", "13x9", "--steps", "3", "--guidance", "2", "--negative", "b", "--interval", "0.1,0.9", "--variations", "1"]
    kept = ["--format", form, *(["--lossless"] if form == "webp" else [])]
    drawn = run("a red fox\n🦊", "--seed", "7", *settings, *kept)["images"][0]
    repeated = run("--like", drawn["path"], *kept, out="again", named=False)["images"][0]
    assert np.array_equal(pixels(repeated), pixels(drawn))
    assert Path(repeated["path"]).name == Path(drawn["path"]).name
    mixed = run("a", "b", "--size", "8x8,9x12", "--steps", "1,4", "--stochasticity", "0.2", "--interpolate", "1", out="mixed")["images"]
    for image in mixed[::3]:
        alone = run("--like", image["path"], out="alone")["images"][0]
        assert np.abs(pixels(alone) - pixels(image)).max() <= 1


def test_another_model_than_that_of_the_image_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "model"
    shutil.copytree(model, moved)
    drawn = run(moved, "a", "--size", "8x8", "--steps", "1", "--device", "cpu", named=False)["images"][0]
    same = run("--like", drawn["path"], out="same", named=False)
    assert "device: cpu (as the image to repeat)" in same["said"]
    assert "was drawn with" not in same["said"]
    other = {name: 1.5 * value for name, value in tiny_network().state_dict().items()}
    save_model(moved, other, SPEC)
    refused = run("--like", drawn["path"], out="other", named=False)
    assert refused["code"] == 2
    assert "the model has changed since it was drawn; give MODEL" in refused["error"]
    assert not (tmp_path / "other").exists()
    changed = run(moved, "--like", drawn["path"], out="other", named=False)
    assert "was drawn with another model, so this will be another image" in changed["said"]
    assert changed["drawn"] == 1


def test_edits(run: Run, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[4:16, 5:25] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    inputs = ["--image", tmp_path / "picture.png", "--mask", tmp_path / "mask.png"]
    drawn = run("a", *inputs, "--steps", "2", "--feather", "2")["images"][0]
    assert (drawn["width"], drawn["height"]) == (30, 20)
    assert np.array_equal(pixels(drawn)[mask == 0], picture[mask == 0])
    assert not np.array_equal(pixels(drawn)[mask > 0], picture[mask > 0])
    repeated = run("--like", drawn["path"], *inputs, out="again")["images"][0]
    assert np.array_equal(pixels(repeated), pixels(drawn))
    assert "was drawn from such a file; give the one of sha256" in run("--like", drawn["path"], out="none")["error"]
    wider = run("a", "--image", tmp_path / "picture.png", "--extend", "4,0,6,2", "--steps", "1", out="wider")["images"][0]
    assert np.array_equal(pixels(wider)[0:20, 4:34], picture)
    assert pixels(wider).shape == (22, 40, 3)


def test_images_and_masks_of_any_kind_are_read_as_they_look(run: Run, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 20 * 30).round().astype(np.uint8).reshape(20, 30)
    half = np.zeros((20, 30), np.uint8)
    half[:, 15:] = 255
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([np.full((20, 30, 3), 255, np.uint8), half])).save(tmp_path / "cut-out.png")
    Image.fromarray(half.astype(np.uint16) * 257).save(tmp_path / "deep-mask.png")
    for mask in ("deep-mask.png", "cut-out.png"):
        drawn = run("a", "--image", tmp_path / "deep.png", "--mask", tmp_path / mask, "--steps", "1", out=f"of-{mask}")["images"][0]
        assert np.array_equal(pixels(drawn)[:, :15], np.repeat(ramp[:, :15, None], 3, axis=2)), mask
        assert not np.array_equal(pixels(drawn)[:, 15:], np.repeat(ramp[:, 15:, None], 3, axis=2)), mask
    whole = (tmp_path / "deep.png").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:60] + b"\xff" * 40 + whole[100:], b"%!PS-Adobe-3.0 EPSF-3.0", b""):
        (tmp_path / "damaged.png").write_bytes(content)
        refused = run("a", "--image", tmp_path / "damaged.png", "--steps", "1", out="none")
        assert (refused["code"], "damaged.png: cannot be read as an image" in refused["error"]) == (2, True), refused
    assert "cannot be read (Is a directory)" in run("a", "--image", tmp_path, out="none")["error"]


def test_two_processes_draw_the_same_as_one(model: Path, run: Run, tmp_path: Path) -> None:
    arguments = ["a", "b", "c", "--size", "8x8,9x5", "--steps", "1,3", "--guidance", "2"]
    alone = run(*arguments)
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "sample",
        str(model),
        *arguments,
        "--processes",
        "2",
        "--out",
        str(tmp_path / "two"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["drawn"] == 12
    assert files(tmp_path / "two") == files(tmp_path / "out")
    for one, other in zip(alone["images"], together["images"], strict=True):
        assert Path(one["path"]).name == Path(other["path"]).name
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert done.stderr.count("device: cpu") == 1


def test_a_list_that_was_killed_goes_on(model: Path, run: Run, tmp_path: Path) -> None:
    arguments = ["a", "--size", "32x32", "--steps", "20", "--count", "24", "--memory-gb", "0.002"]
    command = [sys.executable, "-m", "launch.cli", "sample", str(model), *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("0*.png"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list((tmp_path / "out").glob("0*.png")))
    assert 2 <= there < 24
    assert not (tmp_path / "out" / "grid.png").exists()
    rest = run(*arguments)
    assert rest["drawn"] in (24 - there, 24 - there + 1)
    assert len(list((tmp_path / "out").glob("0*.png"))) == 24
    assert not [name for name in files(tmp_path / "out") if not re.fullmatch(r"0.*\.png|grid.*\.png|samples\.jsonl", name)]
    for image in rest["images"]:
        assert read_settings(Path(image["path"])).seed == image["seed"]


def test_a_full_disk_leaves_whole_files_only(model: Path, tmp_path: Path) -> None:
    command = f"ulimit -f 8; exec {sys.executable} -m launch.cli sample {model} a --size 8x8,64x64 --steps 1 --out {tmp_path / 'out'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"error: .*(File too large|No space left).*\.png", done.stderr.splitlines()[-1]), done.stderr
    for path in (tmp_path / "out").glob("*.png"):
        Image.open(path).load()
    assert not [name for name in files(tmp_path / "out") if not name.endswith((".png", ".jsonl"))]


def test_metadata_is_left_out_on_request(run: Run, tmp_path: Path) -> None:
    image = run("a secret", "--size", "8x8", "--steps", "1", "--no-metadata")["images"][0]
    assert b"secret" not in Path(image["path"]).read_bytes()
    assert run("a secret", "--size", "8x8", "--steps", "1", "--no-metadata")["drawn"] == 0, "samples.jsonl knows it"


WRONG = [
    (["--size", "8x8"], "PROMPT or --prompt TEXT, or --class ID for a class model: neither was given"),
    (["a"], "has no size, and there is no --size"),
    (["a", "--size", "20000x1"], "width 20000: must be from 1 to 16384 pixels"),
    (["a", "--size", "8x8", "--seed", "x"], "--seed x: expected whole numbers"),
    (["a", "--size", "8x8", "--seed", str(2**64)], "exceeds the largest seed"),
    (["a", "--size", "8x8", "--device", "tpu"], "--device tpu: not a device of this machine; give cpu"),
    (["a", "--size", "8x8", "--mask", "m.png"], "--mask m.png: changes an image; give it with --image FILE"),
    (["a", "--image", "m.png"], "--image m.png: no such file"),
    (["a", "--size", "8x8", "--prompts", "p.txt"], "cannot be combined with other prompts; add them to the file"),
    (["--size", "8x8", "--prompts", "p.txt"], "p.txt"),
    (["a", "--size", "8x8", "--aspect", "1:1"], "--size 8x8 and --aspect 1:1: give one of them"),
    (["a", "--megapixels", "1"], "--megapixels 1: give the aspect ratio as well"),
    (["a", "--size", "8x8", "--interpolate", "2"], "--interpolate 2: give two prompts or more"),
    (["a", "--size", "8x8", "--zip", "--steps", "1,2", "--seed", "1,2,3"], "--zip: 2 steps, 3 seeds"),
    (["a", "--size", "8x8", "--memory-gb", "0"], "memory_gb 0.0: must be above 0"),
    (["a", "--size", "8x8", "--stochasticity", "nan"], "Invalid value for '--stochasticity'"),
    (["a", "--size", "8x8", "--times", "2,0"], "this transport's times run from 1 to 0"),
    (["a", "--size", "8x8", "--quality", "50"], "quality"),
    (["a", "--like", "m.png"], "--like m.png: repeats the image as it is; leave out a prompt"),
    (["--like", "m.png"], "m.png"),
    (["--like", "m.png", "--seed", "0"], "--like m.png: repeats the image as it is; leave out --seed"),
    (["--like", "m.png", "--stochasticity", "0.1"], "leave out --stochasticity"),
    (["--like", "m.png", "--image", "m.png", "--strength", "0.3"], "leave out --strength"),
    (["--like", "m.png", "--zip"], "leave out --zip"),
    (["a", "--size", "8x8", "--variation-share", "0.2"], "--variation-share 0.2: give the number of variations as well"),
    (["a", "--size", "8x8", "--count", "1000000000"], "--count 1000000000: at most 100,000 images of a prompt"),
    (["a", "--size", "8x8", "--variations", "1000000000"], "--variations 1000000000: at most 100,000"),
    (["a", "b", "--size", "8x8", "--interpolate", "1000000000"], "--interpolate 1000000000: at most 100,000"),
    (["a", "--size", "8x8", "--feather", "8"], "--feather 8: changes an image; give it with --image FILE"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments)[:30] for arguments, _ in WRONG])
def test_wrong_usage_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done["code"] == 2, done
    assert message in done["error"]
    assert done["said"].splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_long_prompts_are_drawn_and_named(run: Run) -> None:
    done = run("word " * 4000, "--size", "8x8", "--steps", "1")
    assert done["code"] == 0
    assert "is truncated: its first 16 of" in done["said"]
