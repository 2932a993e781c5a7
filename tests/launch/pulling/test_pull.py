"""`tim pull` from a server with the hub's endpoints, and from files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from launch.cli import main
from launch.pulling.published import PUBLISHED
from tests import REPOSITORY
from tests.launch.pulling.hub_server import TOKEN, Hub
from tests.launch.pulling.recipes import NETWORK, RECIPE, parts_of, refused_last
from tests.launch.test_cli import Tim, refused, tim
from tests.tim.models import autoencoder
from tim import Generator
from tim.model_folder.folder import load_model, read_spec

__all__ = ["tim"]


def test_a_model_from_the_hub_is_sampled_and_fine_tuned(hub: Hub, recipe: Path, repositories: Path, tmp_path: Path, tim: Tim) -> None:
    out = tmp_path / "models" / "t2i"
    done = tim("pull", recipe, "--network", NETWORK, "--out", out, "--json")
    assert done.code == 0, done.err
    commits = {name: hub.commit(name) for name in ("authors/tim", "authors/dc-ae", "maker/gemma")}
    assert [(each["part"], each["revision"]) for each in done.data["sources"]] == [
        ("network", commits["authors/tim"]),
        ("codec", commits["authors/dc-ae"]),
        ("text", commits["maker/gemma"]),
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["sources"] == done.data["sources"]
    weights = repositories / "authors" / "tim" / "t2i_model.bin"
    assert config["sources"][0]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    for name, facts in config["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == facts["sha256"]
    assert {"model.safetensors", "codec/config.json", "text_encoder/model.safetensors", "text_encoder/vocab.txt"} <= set(config["files"])
    expected = load_file(repositories / "authors" / "tim" / "model.safetensors")
    network, spec = load_model(out)
    assert spec.rope == "legacy"
    assert all(torch.equal(value, expected[name]) for name, value in network.to_official().items())

    shutil.rmtree(tmp_path / "cache")  # the folder needs nothing else
    hub.requests.clear()
    moved = out.rename(tmp_path / "moved")
    done = tim("sample", moved, "a red image", "--size", "64x32", "--steps", 1, "--out", tmp_path / "images", "--json")
    assert done.code == 0, done.err
    assert Generator.from_pretrained(moved)("a red image", height=32, width=64, steps=1)[0].size == (64, 32)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 99)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"image number {number}")
    small = ["plan.max_tokens=16", "plan.tokens_per_pack=16", "train.steps=1", "loader.workers=0", "log.every=1"]
    done = tim("finetune", photos, "--from", moved, "--out", tmp_path / "run", *small, "--json")
    assert done.code == 0, done.err
    assert read_spec(tmp_path / "run" / "model").rope == "legacy"
    assert not hub.requests


def test_nothing_is_downloaded_twice_and_a_damaged_file_once_more(hub: Hub, recipe: Path, tmp_path: Path, tim: Tim) -> None:
    command = ["pull", recipe, "--network", "hf://authors/tim/model.safetensors", "--out", tmp_path / "model"]
    assert tim(*command).code == 0
    assert {"model.safetensors", "diffusion_pytorch_model.safetensors", "config.json", "vocab.txt"} <= set(hub.downloads())
    assert tim(*command).code == 0
    assert hub.downloads() == []
    stored = next((tmp_path / "cache").glob("models--authors--tim/snapshots/*/model.safetensors")).resolve()
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    assert tim(*command).code == 0
    assert hub.downloads() == ["model.safetensors"]
    hub.wrong.add("model.safetensors")
    shutil.rmtree(tmp_path / "cache" / "models--authors--tim")
    done = tim(*command)
    assert done.code == 2
    assert "model.safetensors does not match the hub's digest, twice" in done.err.splitlines()[-1]
    assert load_model(tmp_path / "model")[1].rope == "legacy"  # the older folder stays


def test_gated_private_and_unreachable_repositories_say_what_to_do(hub: Hub, recipe: Path, tmp_path: Path, tim: Tim) -> None:
    command = ["pull", recipe, "--network", NETWORK, "--out", tmp_path / "model"]
    hub.gated.add("maker/gemma")
    done = tim(*command)
    assert done.code == 2
    page = re.escape(f"{hub.url}/maker/gemma")
    said = rf"error: --text hf://maker/gemma\S*: needs permission: accept the licence at {page}, log in with `hf auth login` \(or set"
    assert re.match(said, done.err.splitlines()[-1]), done.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        assert tim(*command).code == 0
    refused(
        tim("pull", recipe, "--network", "hf://nobody/tim/x.bin", "--out", tmp_path / "no"), r"--network .* it is private: check its name"
    )
    refused(
        tim("pull", recipe, "--network", "hf://authors/tim", "--out", tmp_path / "no"), r"has model\.safetensors, t2i_model\.bin: give one"
    )
    refused(tim("pull", recipe, "--network", NETWORK, "--revision", "v9", "--out", tmp_path / "no"), "--network hf://authors/tim@v9")
    assert tim("pull", recipe, "--network", NETWORK, "--revision", "v1", "--out", tmp_path / "v1").code == 0

    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        commit = hub.commit("authors/tim")
        pinned = ["pull", recipe, "--network", f"hf://authors/tim@{commit}/t2i_model.bin", "--out", tmp_path / "model"]
        assert tim(*pinned).code == 0  # all is in the cache
        shutil.rmtree(tmp_path / "cache" / "models--maker--gemma")
        done = tim(*pinned)
        assert done.code == 2
        assert re.search(r"error: --text hf://maker/gemma cannot be downloaded .*: --text FOLDER", done.err.splitlines()[-1]), done.err


def test_what_does_not_fit_is_named(recipe: Path, repositories: Path, tmp_path: Path, tim: Tim) -> None:
    given = parts_of(repositories)
    out = ["--out", tmp_path / "model"]
    digest = hashlib.sha256((repositories / "authors" / "tim" / "t2i_model.bin").read_bytes()).hexdigest()
    assert tim("pull", recipe, *given, *out, "--sha256", f"t2i_model.bin={digest}").code == 0
    assert (tmp_path / "model" / "README.md").read_text().count("| network |") == 1
    other = "0" * 64
    refused_last(tim("pull", recipe, *given, *out, "--sha256", f"tim/t2i_model.bin={other}"), f"has {digest}, not {other}")
    refused_last(tim("pull", recipe, *given, *out, "--sha256", f"x.bin={digest}"), "x.bin: is none of the files of this model")
    refused_last(tim("pull", recipe, *given, *out, "--sha256", "x.bin=12"), "expected FILE=DIGEST")

    wide = tmp_path / "wide.yaml"
    wide.write_text(RECIPE.replace("hidden_size: 32", "hidden_size: 64"))
    refused_last(
        tim("pull", wide, *given, *out), r"model: holds the model of another recipe, which has another network: give another --out"
    )
    new = ["--out", tmp_path / "new"]
    refused_last(
        tim("pull", wide, *given, *new), r"these weights do not fit this network: wrong shapes: x_embedder.proj.weight \(32, 32, 1, 1\)"
    )
    deep = tmp_path / "deep.yaml"
    deep.write_text(RECIPE.replace(" depth: 1", " depth: 2"))
    refused_last(tim("pull", deep, *given, *new), r"missing keys: blocks\.1\.")
    narrow = tmp_path / "narrow"
    autoencoder(narrow, "sd-vae")
    refused_last(tim("pull", recipe, *given, *out, "--codec", narrow), "has AutoencoderKL, codec dc-ae is AutoencoderDC")
    short = Path(shutil.copytree(repositories / "maker" / "gemma", tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    refused_last(tim("pull", recipe, *given, *out, "--text", short), "its features have width 48, the network takes 32")
    cut = Path(shutil.copytree(repositories / "maker" / "gemma", tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:400])
    refused_last(tim("pull", recipe, *given, *out, "--text", cut), r"cut/model\.safetensors")
    weights = load_file(repositories / "authors" / "tim" / "model.safetensors")
    weights["final_layer.linear.bias"][0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    refused_last(
        tim("pull", recipe, *given, *out, "--network", tmp_path / "nan.safetensors"), "final_layer.linear.bias has values that are not"
    )
    (tmp_path / "bad.bin").write_bytes(b"cposix\nsystem\n(S'touch exploded'\ntR.")
    refused_last(tim("pull", recipe, *given, *out, "--network", tmp_path / "bad.bin"), "bad.bin: cannot read weights")
    assert load_model(tmp_path / "model")[1].rope == "legacy"  # the model of the first call
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model"]


def test_parts_that_are_not_known_are_asked_for(tmp_path: Path, tim: Tim) -> None:
    out = ["--out", tmp_path / "model"]
    refused(tim("pull", "t2i-xl-1", *out), r"give --network FILE, its published weights; --codec FOLDER, DC-AE f32c32 of Sana 1\.1")
    refused(tim("pull", "photos", *out), "photos: not the recipe of a published network: give one of t2i-xl-1")
    refused(tim("pull", "c2i-b-4-256", *out, "--text", "x"), "--text x: the model of c2i-b-4-256 has no weights for that")
    refused(tim("pull", "c2i-b-4-256", *out, "--revision", "v1"), "--revision v1: goes with a network on the hub")
    done = tim("pull", "--list")
    assert done.code == 0
    assert all(recipe in done.out for recipe in PUBLISHED)
    assert list(tim("pull", "--json").data["recipes"]) == list(PUBLISHED)


def test_the_published_sizes_are_those_of_the_recipes() -> None:
    from launch.config.load import load_config
    from tim import TransitionTransformer
    from tim.network import PROJECTOR

    for recipe, found in PUBLISHED.items():
        config = load_config(recipe)
        params = {**config.network.params.model_dump(exclude_none=True)}
        if config.condition == "text":
            params["cap_feat_dim"] = 1152
        with torch.device("meta"):
            weights = TransitionTransformer.from_official(params).state_dict()
        assert sum(value.numel() for name, value in weights.items() if not name.startswith(PROJECTOR)) == found.parameters


def test_no_room_is_said_before_anything_is_downloaded(
    hub: Hub, recipe: Path, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage("/")
    monkeypatch.setattr("launch.pulling.downloads.shutil.disk_usage", lambda path: real._replace(free=1000))
    refused(tim("pull", recipe, "--network", NETWORK, "--out", tmp_path / "model"), r"needs 0\.0 GB, and 0\.0 GB are free: make room")
    assert hub.downloads() == []


def test_a_killed_pull_goes_on(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "launch.cli", "pull", str(recipe), "--network", NETWORK, "--out", str(tmp_path / "model"), "--json"]
    hub.slow.add("model.safetensors")  # the last large file, of the text encoder
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while not any(line.startswith("GET ") and line.endswith("/model.safetensors") for line in hub.requests):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.slow.clear()
    before = hub.downloads()
    assert "t2i_model.bin" in before
    assert not (tmp_path / "model").exists()
    (tmp_path / "model.tmp").mkdir()  # as a process leaves it that is killed while it writes
    (tmp_path / "model.tmp" / "model.safetensors").write_bytes(b"half")
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(hub.downloads()) & (set(before) - {"model.safetensors", "config.json"})
    assert load_model(tmp_path / "model")[1].rope == "legacy"
    assert not (tmp_path / "model.tmp").exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pull", "--help"])
    assert "Example: tim pull" in capsys.readouterr().out
