"""`tim finetune` as people type it, and the defaults that it chooses."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from launch.checkpoints.export import spec_of
from launch.checkpoints.initial_weights import load_weights
from launch.config.load import load_config
from launch.config.schema import Config, TrainConfig
from launch.finetune_job import Base, add_length, defaults, read_base
from launch.logs.startup import Startup
from launch.training.metrics import read_rows
from tests import REPOSITORY
from tests.isolation import isolated_process
from tests.launch.test_cli import Tim, refused, tim
from tests.tim.models import autoencoder, bert
from tim import TransitionTransformer
from tim.model_folder.folder import save_model

__all__ = ["tim"]

PHOTOS = 6
SMALL = ["train.steps=2", "loader.workers=0", "log.every=1"]


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with isolated_process():
        yield


@pytest.fixture(scope="module")
def photos(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the photographs with their captions."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    source = shared / "corpora" / "photos"
    names = sorted(path.name for path in source.glob("*.JPEG"))[:PHOTOS]
    for name in names:
        (folder / name).symlink_to((source / name).resolve())
    lines = (source / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(line for line in lines if any(f'"{name}"' in line for name in names)))
    return folder


def make_model(folder: Path, config: Config) -> Path:
    network = TransitionTransformer.from_official(config.network.params.model_dump(exclude_none=True), rope=config.network.rope)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    save_model(folder, network.state_dict(), spec_of(config))
    return folder


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `tim demo` leaves it."""
    return make_model(tmp_path_factory.mktemp("demo") / "base", load_config("demo"))


def test_one_command_trains_the_model_on_photographs_and_goes_on(photos: Path, demo_model: Path, tmp_path: Path, tim: Tim) -> None:
    out = tmp_path / "runs" / "mine"
    command = ["finetune", photos, "--from", demo_model, "--out", out, *SMALL]
    done = tim(*command, "--json")
    assert done.code == 0, done.err
    assert done.data["run"] == str(out)
    assert (done.data["images"], done.data["steps"], done.data["last"]["step"]) == (PHOTOS, 2, 2)
    assert done.data["model"] == str(out / "model")
    assert "encode: nothing to do" in done.err
    assert "train: all weights, 2 steps" in done.err
    written = load_config(out / "config.yaml")
    assert (written.train.init, written.network, written.text.kind) == (str(demo_model), load_config("demo").network, "lookup")
    before, after = load_weights(demo_model).state, load_weights(out / "model").state
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved < 0.01  # fine-tuned, not trained anew

    again = tim(*command[:-3], "train.steps=3", *SMALL[1:], "--json")
    assert again.code == 0, again.err
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3]
    assert "continuing from" in again.err
    assert again.data["steps"] == 3

    sampled = tim("sample", out, "--prompt", "a hen", "--size", "48x32", "--steps", 1, "--out", tmp_path / "images")
    assert sampled.code == 0, sampled.err
    assert {Image.open(path).size for path in (tmp_path / "images").glob("*.png") if path.name != "grid.png"} == {(48, 32)}


@pytest.mark.soak
def test_a_killed_command_goes_on_where_it_stopped(photos: Path, demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = ["train.steps=30", "checkpoint.every=5", "log.every=1", "loader.workers=0"]
    command = [sys.executable, "-m", "launch.cli", "finetune", str(photos), "--from", str(demo_model), "--out", str(out), *overrides]
    for killed_at in (3, 12):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(row["step"] >= killed_at for row in read_rows(out / "metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.2)
        process.kill()
        process.wait()
        assert not (out / "model").exists()
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=1200)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, 31))
    assert (out / "model" / "config.json").is_file()


@pytest.mark.skipif("lora" not in TrainConfig.model_fields, reason="train.lora is not there")
def test_lora_leaves_the_base_as_it_is(photos: Path, demo_model: Path, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a prepared corpus. Everything that takes time before the first step is shown."""
    prepare([str(photos)], out=tmp_path / "corpus", config=PrepareConfig())
    stages: list[str] = []
    monkeypatch.setattr(Startup, "shown", lambda _, stage: stages.append(stage) or nullcontext())
    done = tim("finetune", tmp_path / "corpus", "--from", demo_model, "--out", tmp_path / "run", "--lora", *SMALL, "--json")
    assert done.code == 0, done.err
    assert load_config(tmp_path / "run" / "config.yaml").train.model_dump()["lora"] is not None
    assert "adapters (LoRA)" in done.err
    assert stages == ["importing torch", "planning", "importing DeepSpeed"]


def test_features_are_cached_where_a_codec_or_an_encoder_takes_time(photos: Path, tmp_path: Path, tim: Tim) -> None:
    autoencoder(tmp_path / "vae", "sd-vae")
    bert(tmp_path / "bert")
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(
            {
                "plan": {"max_tokens": 64, "tokens_per_pack": 64},
                "codec": {"kind": "sd-vae", "path": str(tmp_path / "vae")},
                "text": {"kind": "hf", "path": str(tmp_path / "bert"), "max_tokens": 16},
                "network": {"params": {"patch_size": 1, "depth": 1, "hidden_size": 32, "num_heads": 2, "cap_feat_dim": 24}},
                "objective": {"diffusion_share": 1, "consistency_share": 0, "shift": 64},
                "train": {"steps": 1},
            }
        )
    )
    base = make_model(tmp_path / "base", load_config(tmp_path / "tiny.yaml"))
    done = tim(
        "finetune", photos, "--from", base, "--out", tmp_path / "run", *SMALL, "plan.max_tokens=64", "plan.tokens_per_pack=64", "--json"
    )
    assert done.code == 0, done.err
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.corpus[0].features == tmp_path / "run" / "features"
    assert (config.objective.diffusion_share, config.objective.shift) == (1, 64)  # the model is one without transitions
    shutil.rmtree(tmp_path / "vae")  # features alone are enough to go on
    assert len(list((tmp_path / "run" / "features").glob("*.tar"))) == 1


def test_what_cannot_work_is_said_before_the_work(photos: Path, demo_model: Path, tmp_path: Path, tim: Tim) -> None:
    def attempt(*arguments: object, base: object = demo_model, out: object = tmp_path / "run", images: object = photos):
        return tim("finetune", images, "--from", base, "--out", out, *arguments)

    refused(
        attempt(base=tmp_path / "nothing"), "--from .*nothing: no such folder or weight file; give a model folder, .* or hf://OWNER/NAME"
    )
    refused(attempt(base=photos), "--from .*: neither a model folder .* nor a run .*tim train RECIPE train.init=FILE")
    refused(attempt("train.lrr=1"), "command line: train.lrr: .*train.lr")
    refused(attempt("corpus=x"), "corpus: `tim finetune` sets it")
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    refused(attempt(out=tmp_path / "other"), "--out .*other: not empty .notes.txt is in it. and not a run: give a new folder")
    (tmp_path / "other" / "config.yaml").touch()
    refused(attempt(out=tmp_path / "other"), "a run that `tim finetune` did not start: continue it with `tim train .*config.yaml`")

    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "finetune.yaml.host-1.tmp").touch()  # of a start that was killed
    refused(attempt("train.lrr=1", out=tmp_path / "begun"), "command line: train.lrr: .*train.lr")
    settings = defaults(read_base(str(demo_model)), out=tmp_path / "begun", lora=True, device_bytes=None)
    (tmp_path / "begun" / "finetune.yaml").write_text(yaml.safe_dump(settings))
    refused(attempt(out=tmp_path / "begun"), "--out .*begun: the run there trains adapters: add --lora, or give another --out")
    for name in ("copy", "begun/model"):
        shutil.copytree(demo_model, tmp_path / name)
    refused(
        attempt("train.lora={rank: 2}", base=tmp_path / "copy", out=tmp_path / "begun"),
        f"--from .*copy: the run in .*begun began with {demo_model}: give that, or another --out",
    )
    refused(attempt(base=tmp_path / "begun" / "model", out=tmp_path / "begun"), "--from .*model: is in --out .*begun, .*give another --out")

    (tmp_path / "bare").mkdir()
    for number in range(4):
        Image.new("RGB", (40 + number, 40), (60 * number, 99, 30)).save(tmp_path / "bare" / f"{number}.png")
    none = attempt(images=tmp_path / "bare", out=tmp_path / "bare_run")
    assert none.code != 0
    assert "no usable image among 4 inputs (no-caption 4)" in none.err
    for number in range(2):
        (tmp_path / "bare" / f"{number}.txt").write_text(f"colour {number}")
    few = attempt(images=tmp_path / "bare", out=tmp_path / "few_run")
    assert few.code == 2
    assert "has 2 images, too few to fine-tune on: give at least 3; see report.html" in few.err.splitlines()[-1]


def test_defaults_follow_from_the_model_and_the_images(tmp_path: Path) -> None:
    demo = load_config("demo")
    base = Base("m", spec_of(demo), run=demo)
    values = defaults(base, out=tmp_path, lora=False, device_bytes=None)
    assert values["plan"]["max_tokens"] == demo.plan.max_tokens
    assert values["objective"] == {"transport": "ot_fm", "diffusion_share": 0.5, "consistency_share": 0.1, "shift": 7}
    assert (values["train"]["precision"], values["train"]["lr"]) == ("fp32", pytest.approx(2e-5 * 1152 / 128))
    alone = defaults(Base("m", spec_of(load_config("t2i-xl-1")), run=None), out=tmp_path, lora=True, device_bytes=24e9)
    assert alone["plan"]["max_tokens"] == 1024  # 1024 × 1024 pixels in patches of 32
    assert (alone["train"]["lr"], alone["train"]["lora"], alone["train"]["checkpointing"]) == (1e-4, {}, "full")
    assert alone["network"]["params"].get("z_dim") is None
    assert defaults(base, out=tmp_path, lora=False, device_bytes=80e9)["train"]["checkpointing"] == "none"

    lengths = {images: add_length(values, images=images, per_step=4.0) for images in (5, 20, 100, 5000)}
    assert {images: found["train"]["steps"] for images, found in lengths.items()} == {5: 125, 20: 500, 100: 1000, 5000: 12500}
    assert {images: found["train"]["ema"] for images, found in lengths.items()} == {5: 0.92, 20: 0.98, 100: 0.99, 5000: 0.9992}
    assert lengths[20]["train"]["init"] == "m"
    shorter = add_length(values, images=20, per_step=4.0, steps=10)
    assert (shorter["train"]["steps"], shorter["train"]["warmup"], shorter["train"]["ema"]) == (10, 10, 0.98)
