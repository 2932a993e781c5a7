"""`hf://OWNER/NAME` wherever a command takes a model, and all commands on a pulled folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from launch.cli import main
from launch.evaluation.samples import run_of
from launch.finetune_job import read_base
from launch.model_place import locate_model
from launch.sampling.files.image_files import read_settings
from tests.launch.pulling.hub_server import Hub
from tests.launch.pulling.recipes import RECIPE, parts_of
from tests.launch.serving.server import started
from tests.launch.test_cli import Tim, refused, tim
from tim import Generator
from tim.model_folder.folder import load_model, read_spec, save_model
from tim.model_folder.location import local_model
from tim.pretrained import hub as hub_library
from tim.pretrained.safetensors_files import LazyTensors

__all__ = ["tim"]

SMALL = ["plan.max_tokens=16", "plan.tokens_per_pack=16", "train.steps=1", "loader.workers=0", "log.every=1"]
FEW = ["--steps", "1", "--images", "8", "--resamples", "8", "--memorised", "0"]
DRAW = ["a red image", "--size", "64x32", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def pulled(repositories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pulled model folder."""
    folder = tmp_path_factory.mktemp("pulled")
    (folder / "mine.yaml").write_text(RECIPE)
    assert main(["pull", str(folder / "mine.yaml"), *parts_of(repositories), "--out", str(folder / "model")]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos = tmp_path_factory.mktemp("photos")
    for number in range(10):
        Image.effect_noise((64 + 32 * (number % 2), 64), 40 + number).convert("RGB").save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"image number {number}")
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    assert main(["prepare", str(photos), "--out", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.mark.parametrize("place", ["folder", pytest.param("hub", marks=pytest.mark.soak)])
def test_a_pulled_model_is_sampled_evaluated_served_and_fine_tuned(
    place: str, hub: Hub, pulled: Path, corpus: Path, tmp_path: Path, tim: Tim
) -> None:
    shutil.copytree(pulled, hub.root / "me" / "model")
    model = str(pulled) if place == "folder" else "hf://me/model"
    done = tim("sample", model, *DRAW, "--out", tmp_path / "images", "--json")
    assert done.code == 0, done.err
    image = done.data["images"][0]["path"]
    assert read_settings(Path(image)).model == model
    again = tim("sample", "--like", image, "--out", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    assert Image.open(again.data["images"][0]["path"]).tobytes() == Image.open(image).tobytes()

    done = tim("eval", model, "--corpus", corpus, *FEW, "--out", tmp_path / "evaluation", "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "evaluation" / "eval.json").is_file()

    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    with started(model, environment=environment) as server:
        answer = server.draw(width=64, height=32, prompt="a red image")
        assert answer.status == 200, answer.body
        assert server.get("/api/model").json["name"] == ("pulled0" if place == "folder" else "me/model")

    done = tim("finetune", corpus, "--from", model, "--out", tmp_path / "run", *SMALL, "--json")
    assert done.code == 0, done.err
    assert read_spec(tmp_path / "run" / "model").rope == "legacy"


def test_only_the_files_of_the_model_are_downloaded_and_then_no_hub_is_needed(
    hub: Hub, pulled: Path, tmp_path: Path, tim: Tim, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    many = hub.root / "me" / "many"
    shutil.copytree(pulled, many / "models" / "first")
    (many / "models" / "second.safetensors").write_bytes(b"large")
    model = "hf://me/many@v1/models/first"
    done = tim("sample", model, *DRAW, "--out", tmp_path / "online", "--json")
    assert done.code == 0, done.err
    fetched = hub.downloads()
    assert {"config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"} <= set(fetched)
    assert "second.safetensors" not in fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = tim("sample", model, *DRAW, "--out", tmp_path / "offline", "--json")
    assert done.code == 0, done.err
    assert not hub.requests
    base = read_base(model)
    assert (base.name, base.spec.network, base.run) == (model, read_spec(pulled).network, None)
    (tmp_path / "config.yaml").touch()  # of a run that has nothing to do with the model
    monkeypatch.chdir(tmp_path)
    assert run_of(model) is None
    assert torch.equal(load_model(local_model(model))[0].final_layer.linear.bias, load_model(pulled)[0].final_layer.linear.bias)
    refused(
        tim("sample", "hf://me/model", *DRAW, "--out", tmp_path / "none"),
        r"hf://me/model cannot be downloaded \(HF_HUB_OFFLINE is set\), and not all of it is in the cache .*: unset it, or give a local",
    )
    assert not (tmp_path / "none").exists()


def test_both_layouts_and_files_of_weights(hub: Hub, pulled: Path, repositories: Path, tmp_path: Path, tim: Tim) -> None:
    weights = load_file(pulled / "model.safetensors")
    save_model(hub.root / "me" / "pipe", weights, read_spec(pulled), layout="diffusers", copy_models=True)
    sharded = hub.root / "me" / "sharded"
    save_model(sharded, LazyTensors.of(weights), read_spec(pulled), copy_models=True, max_shard_bytes=100_000)
    own = Generator.from_pretrained(pulled)("a red image", height=32, width=64, steps=1)[0].tobytes()
    for name in ("hf://me/pipe", "me/pipe", "hf://me/sharded"):
        assert Generator.from_pretrained(name)("a red image", height=32, width=64, steps=1)[0].tobytes() == own
    assert len(list(sharded.glob("model-*.safetensors"))) > 1

    (tmp_path / "mine.yaml").write_text(RECIPE)
    parts = ["--codec", repositories / "authors" / "dc-ae", "--text", repositories / "maker" / "gemma"]
    for name in ("hf://authors/tim/t2i_model.bin", "hf://me/sharded/model.safetensors.index.json"):
        done = tim("sample", name, *DRAW, "--recipe", tmp_path / "mine.yaml", *parts, "--out", tmp_path / Path(name).name, "--json")
        assert done.code == 0, done.err
        assert Image.open(done.data["images"][0]["path"]).tobytes() == own


def test_what_is_no_model_is_said_in_one_line(hub: Hub, pulled: Path, corpus: Path, tmp_path: Path, tim: Tim) -> None:
    out = ["--out", tmp_path / "none"]
    for name, message in (
        ("hf://maker/gemma", r"config\.json is not of a model of tim .*`tim pull` builds a model folder"),
        ("hf://authors/tim", r"hf://authors/tim: has no config\.json of a model; for a file of weights, give hf://authors/tim/FILE"),
        ("hf://nobody/model", r"hf://nobody/model: there is no .*/nobody/model, or it is private"),
        ("hf://authors/tim/other.safetensors", r"hf://authors/tim/other\.safetensors: has no file other\.safetensors"),
        ("hf://authors/tim@v9/t2i_model.bin", r"has no branch, tag or commit v9"),
        ("hf://authors/../../x", "leads out of the repository: remove '..'"),
        ("hf://authors", r"expected hf://OWNER/NAME\[@REVISION\]\[/FOLDER\]"),
    ):
        for command in (
            ["sample", name, *DRAW, *out],
            ["eval", name, "--corpus", corpus, *out],
            ["serve", name, "--port", "0"],
            ["finetune", tmp_path, "--from", name, *out],
            ["export", name, *out],
        ):
            done = tim(*command)
            assert done.code == 2, (command, done)
            assert re.search(message, done.err.splitlines()[-1]), (command, done.err)
    forms = r"no such folder or weight file; give a model folder, a run folder, a checkpoint of a run, .* or hf://OWNER/NAME"
    for command in (["sample", "nowhere", *DRAW], ["eval", "nowhere", "--corpus", corpus], ["serve", "nowhere", "--port", "0"]):
        assert re.search(f"error: nowhere: {forms}", tim(*command).err)
    assert re.search(f"error: --from nowhere: {forms}", tim("finetune", tmp_path, "--from", "nowhere", *out).err)
    assert re.search(f"error: nowhere: {forms}", tim("export", "nowhere", *out).err)
    refused(tim("export", pulled, *out), "has no checkpoints to export: give a run folder, or a checkpoint of a run")
    with pytest.raises(ValueError, match="here/there: no such folder, and hf://here/there: there is no"):
        Generator.from_pretrained("here/there")


def test_a_description_that_leads_out_of_its_repository_is_refused(hub: Hub, pulled: Path, tmp_path: Path, tim: Tim) -> None:
    for number, name in enumerate(("../../../../outside.safetensors", "/etc/hostname", "codec/../../x")):
        folder = Path(shutil.copytree(pulled, hub.root / "me" / f"bad{number}"))
        config = json.loads((folder / "config.json").read_text())
        config["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        (folder / "config.json").write_text(json.dumps(config))
        done = tim("sample", f"hf://me/bad{number}", *DRAW, "--out", tmp_path / "none")
        assert done.code == 2
        assert f"names {name!r}, which is not in the repository" in done.err.splitlines()[-1]
    shards = hub.root / "me" / "shards"
    shards.mkdir()
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    done = tim("sample", "hf://me/shards/model.safetensors.index.json", *DRAW, "--out", tmp_path / "none")
    assert done.code == 2
    assert "shards are .safetensors files beside it" in done.err.splitlines()[-1]


def test_a_damaged_download_is_refused(hub: Hub, pulled: Path, tmp_path: Path, tim: Tim) -> None:
    shutil.copytree(pulled, hub.root / "me" / "model")
    hub.wrong.add("model.safetensors")
    done = tim("sample", "hf://me/model", *DRAW, "--out", tmp_path / "none")
    assert done.code == 2
    assert "does not match its digest in config.json" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "repository", "revision", "inside"),
    [
        ("hf://a/b", "a/b", None, ""),
        ("hf://a/b/", "a/b", None, ""),
        ("hf://a/b@v1/c/d.bin", "a/b", "v1", "c/d.bin"),
        ("hf://a/b@refs/pr/3/c", "a/b", "refs/pr/3", "c"),
        ("hf://a/b@new%2Fidea/c", "a/b", "new/idea", "c"),
        ("hf://a/b/c@2x", "a/b", None, "c@2x"),
    ],
)
def test_addresses(name: str, repository: str, revision: str | None, inside: str) -> None:
    found = hub_library.parse(name)
    assert found == (repository, revision, inside)
    assert hub_library.parse(str(found)) == found


def test_places_of_models(tmp_path: Path, pulled: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "config.yaml").touch()
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    found = [locate_model(each) for each in (pulled, run, run / "checkpoints" / "step-000002", tmp_path / "a.safetensors", tmp_path)]
    assert [(place.kind, place.run, place.step) for place in found] == [
        ("folder", None, None),
        ("run", run, None),
        ("checkpoint", run, 2),
        ("weights", None, None),
        ("weights", None, None),
    ]
    before = Path.cwd()
    os.chdir(run / "checkpoints")
    try:
        assert locate_model("step-000002").run == run
    finally:
        os.chdir(before)
