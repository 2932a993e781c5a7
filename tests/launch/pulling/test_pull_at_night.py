"""`tim pull` when the hub, the network, the disk or another process is in the way, and with weights in every form."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.pulling.downloads import Part, plan
from tests import REPOSITORY
from tests.launch.pulling.hub_server import Hub
from tests.launch.pulling.recipes import NETWORK, RECIPE, parts_of, refused_last
from tests.launch.test_cli import Tim, refused, tim
from tests.tim.models import autoencoder
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim.model_folder.folder import load_model, save_model
from tim.pretrained import hub as hub_library

__all__ = ["tim"]

CHUNK = 1000  # bytes that the library reads at once, by default 10 MB


def test_what_may_pass_is_tried_again(
    hub: Hub, recipe: Path, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub_library, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    command = ["pull", recipe, "--network", NETWORK, "--out", tmp_path / "model"]
    hub.failing = {"authors/tim": 2, "t2i_model.bin": 1}
    hub.broken = {"diffusion_pytorch_model.safetensors": 1}
    with caplog.at_level(logging.WARNING, "tim.pretrained.hub"):
        assert tim(*command).code == 0
    assert len([line for line in caplog.messages if "trying again in 0 s" in line]) >= 3
    size = (hub.root / "authors" / "dc-ae" / "diffusion_pytorch_model.safetensors").stat().st_size
    (start,) = hub.ranges
    assert size // 2 - CHUNK <= start <= size // 2  # the broken download went on at its half
    shutil.rmtree(tmp_path / "cache")
    hub.failing = {"t2i_model.bin": 9}
    refused_last(tim(*command), r"--network hf://authors/tim\S* cannot be downloaded \(.*503.*run the same command later, or give")
    assert load_model(tmp_path / "model")[1].rope == "legacy"


def test_a_wrong_token_is_named(hub: Hub, recipe: Path, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    command = ["pull", recipe, "--network", NETWORK, "--out", tmp_path / "model"]
    refused(tim(*command), r"--network hf://authors/tim/t2i_model\.bin: the hub does not accept your token \(HF_TOKEN, or that of")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left for the hub's cache .*: make room, or set HF_HOME to a folder on another disk, then run the same"),
        (errno.EACCES, "the hub's cache .* cannot be written: set HF_HOME to a folder of your own"),
    ],
)
def test_a_disk_that_cannot_be_written_is_named(number: int, said: str) -> None:
    found = hub_library.refusal(hub_library.parse("hf://a/b"), OSError(number, os.strerror(number)))
    assert not isinstance(found, hub_library.HubUnreachableError)
    assert re.search(f"^hf://a/b: {said}", str(found))


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_room_is_checked_before_a_codec_of_unknown_geometry_is_downloaded(
    kind: str, hub: Hub, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder(hub.root / "me" / kind, kind)
    (tmp_path / "mine.yaml").write_text(
        RECIPE.replace("{kind: dc-ae, path: hf://authors/dc-ae}", f"{{kind: {kind}, path: hf://me/{kind}}}")
    )
    command = ["pull", tmp_path / "mine.yaml", "--network", NETWORK, "--out", tmp_path / "model"]
    with monkeypatch.context() as patch:
        real = shutil.disk_usage("/")
        patch.setattr("launch.pulling.downloads.shutil.disk_usage", lambda path: real._replace(free=1000))
        refused(tim(*command), "make room")
    assert hub.downloads() == []
    from launch.config.load import load_config

    assert load_config(tmp_path / "mine.yaml").codec.kind == kind  # reads the geometry
    assert set(hub.downloads()) <= {"config.json", "model_index.json"}


def test_digests_of_the_list_count_even_if_the_cache_does_not_know_them(hub: Hub, tmp_path: Path) -> None:
    planned = plan(Part("--codec", "hf://authors/dc-ae", ("vae",)))
    assert planned is not None
    name = "diffusion_pytorch_model.safetensors"
    file = hub_library.download(planned.address, name)
    renamed = file.resolve().rename(tmp_path / "stored")
    file.unlink()
    file.symlink_to(renamed)  # as a mirror leaves it that states no digest
    assert not hub_library.is_damaged(file)
    assert not hub_library.is_damaged(file, stated=planned.digests[name])
    renamed.write_bytes(renamed.read_bytes()[:-1] + b"x")
    assert not hub_library.is_damaged(file)
    assert hub_library.is_damaged(file, stated=planned.digests[name])


def test_a_damaged_cache_is_refused_offline(hub: Hub, recipe: Path, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    command = ["pull", recipe, "--network", NETWORK, "--out", tmp_path / "model"]
    assert tim(*command).code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tim(*command).code == 0
    stored = next((tmp_path / "cache").glob("models--maker--gemma/snapshots/*/model.safetensors")).resolve()
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    refused_last(tim(*command), r"--text .*model\.safetensors: does not match the hub's digest: remove it")


def test_weights_of_a_text_encoder_are_compared_with_its_config(recipe: Path, repositories: Path, tmp_path: Path, tim: Tim) -> None:
    out = ["--out", tmp_path / "model"]

    def encoder(name: str, change: object) -> Path:
        folder = Path(shutil.copytree(repositories / "maker" / "gemma", tmp_path / name))
        weights = load_file(folder / "model.safetensors")
        layer = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
        if change is None:
            del weights[layer]
        else:
            weights[layer] = torch.zeros(3, 5)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    given = parts_of(repositories)[:4]
    refused_last(
        tim("pull", recipe, *given, "--text", encoder("lacks", None), *out), r"its weights lack layers\.1\.mlp\.up_proj\.weight: w"
    )
    refused_last(tim("pull", recipe, *given, "--text", encoder("other", 0), *out), r"other.*up_proj\.weight|other.*mismatch")
    assert not (tmp_path / "model").exists()


def test_weights_in_every_form(recipe: Path, repositories: Path, tmp_path: Path, tim: Tim) -> None:
    parts = parts_of(repositories)[2:]
    weights = load_file(repositories / "authors" / "tim" / "model.safetensors")
    names = sorted(weights)
    folder = tmp_path / "sharded"
    folder.mkdir()
    for number, shard in enumerate((names[:20], names[20:])):
        save_file({name: weights[name].bfloat16() for name in shard}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (i >= 20)}-of-00002.safetensors" for i, name in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    done = tim("pull", recipe, "--network", folder, *parts, "--out", tmp_path / "model", "--json")
    assert done.code == 0, done.err
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], weights[name].bfloat16()) for name in names)

    wrong: list[tuple[dict[str, str], str]] = [
        ({**weight_map, names[0]: "../sharded/model-00001-of-00002.safetensors"}, r"names '\.\./sharded/.*but shards are .* beside it"),
        ({**weight_map, names[0]: "model-00009-of-00009.safetensors"}, r"model-00009-of-00009\.safetensors is missing, but .* names it"),
        ({**weight_map, names[0]: weight_map[names[-1]]}, rf"a tensor is not in model-00002\S+, for example {re.escape(names[0])}"),
        ({name: file for name, file in weight_map.items() if name != names[5]}, rf"missing keys: {re.escape(names[5])}"),
    ]
    for changed, said in wrong:
        index.write_text(json.dumps({"weight_map": changed}))
        refused_last(tim("pull", recipe, "--network", folder, *parts, "--out", tmp_path / "new"), said)
    save_file({**weights, "blocks.7.extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    refused_last(tim("pull", recipe, "--network", tmp_path / "extra.safetensors", *parts, "--out", tmp_path / "new"), r"blocks\.7\.extra")
    refused(
        tim("pull", recipe, "--network", tmp_path / "none.bin", *parts, "--out", tmp_path / "new"), r"--network .*none\.bin: no such file"
    )
    refused(
        tim("pull", recipe, *parts_of(repositories)[:2], "--codec", tmp_path / "none", "--out", tmp_path / "new"), "--codec .*no such fo"
    )
    link = tmp_path / "link.bin"
    link.symlink_to(repositories / "authors" / "tim" / "t2i_model.bin")
    assert tim("pull", recipe, "--network", link, *parts, "--out", tmp_path / "linked").code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))


def test_a_model_that_was_not_pulled_is_not_replaced(recipe: Path, repositories: Path, tmp_path: Path, tim: Tim) -> None:
    save_model(tmp_path / "model", tiny_network().state_dict(), SPEC)
    before = (tmp_path / "model" / "config.json").read_bytes()
    refused(
        tim("pull", recipe, *parts_of(repositories), "--out", tmp_path / "model"),
        r"--out .*model: holds a model that `tim pull` did not write: give another --out, or remove the folder first",
    )
    assert (tmp_path / "model" / "config.json").read_bytes() == before


@pytest.mark.soak
def test_two_pulls_into_one_folder(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "launch.cli", "pull", str(recipe), "--network", NETWORK, "--out", str(tmp_path / "model"), "--json"]
    settings = {"env": environment, "cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **settings) for _ in range(2)]
    said = [process.communicate() for process in processes]
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == 0 or "another process is writing it" in json.loads(out)["error"], err
    assert 0 in [process.returncode for process in processes]
    assert load_model(tmp_path / "model")[1].rope == "legacy"
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model"]
