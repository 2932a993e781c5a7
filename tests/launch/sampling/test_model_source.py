"""Models to sample from as people have them, and model folders that are moved."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from launch.checkpoints.export import export, model_folder, spec_of
from launch.config.load import load_config
from launch.finetune_job import read_base
from launch.sampling.model_source import Replacements, make_generator, open_model
from tests.launch.checkpoints.test_export import save_checkpoint
from tests.launch.test_cli import Done, Tim, refused, tim
from tests.tim.models import autoencoder, bert
from tim import Generator, TransitionTransformer
from tim.model_folder.folder import read_spec
from tim.model_folder.replacing import replaced_folder

__all__ = ["tim"]

PIXELS = """\
text: {max_tokens: 16}
network:
  params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2}
"""
LATENTS = """\
codec: {kind: sd-vae, path: CODEC}
text: {kind: hf, path: TEXT, max_tokens: 16}
network:
  params: {patch_size: 1, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 24}
train: {steps: 2}
"""
SIZE: dict[str, Any] = {"height": 32, "width": 32, "steps": 1}


def new_run(folder: Path, config: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    save_checkpoint(folder, step=2)
    return folder


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A run whose codec and text encoder lie beside it."""
    codec, encoder = autoencoder(tmp_path / "models" / "vae", "sd-vae"), bert(tmp_path / "models" / "bert")
    return new_run(tmp_path / "run", LATENTS.replace("CODEC", str(codec)).replace("TEXT", str(encoder)))


def opened(path: Path, *, recipe: str | None = None, **replacements: str) -> Generator:
    network, spec, _ = open_model(path, recipe=recipe, replacements=Replacements(**replacements), log=lambda line: None)
    return make_generator(network, spec, device=torch.device("cpu"))


def refused_after_remarks(done: Done, pattern: str) -> None:
    """Exit code 2 and one line of error, after the lines that say which model and device were taken."""
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(f"error: .*{pattern}.*", done.err.splitlines()[-1]), done.err


def test_an_official_export_says_all_that_sampling_needs(latents: Path, tmp_path: Path) -> None:
    pixels = new_run(tmp_path / "pixels", PIXELS)
    for run in (latents, pixels):
        export(run, out=tmp_path / f"{run.name}-official", official=True)
        _, spec, _ = open_model(tmp_path / f"{run.name}-official", recipe=None, replacements=Replacements(), log=print)
        wanted = spec_of(load_config(run / "config.yaml"))
        assert (spec.rope, spec.codec, spec.text, spec.sampling) == (wanted.rope, wanted.codec, wanted.text, wanted.sampling)
        generator = opened(tmp_path / f"{run.name}-official")
        assert generator("a", **SIZE)[0].size == (32, 32)


def test_the_published_files_with_a_recipe(latents: Path, tmp_path: Path) -> None:
    export(latents, out=tmp_path / "official", official=True)
    shutil.copy(tmp_path / "official" / "model.safetensors", tmp_path / "t2i.safetensors")
    weights = load_file(tmp_path / "t2i.safetensors")
    torch.save({"ema": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "t2i.bin")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(LATENTS.replace(", path: CODEC", "").replace(", path: TEXT", ""))
    models = {"codec": str(tmp_path / "models" / "vae"), "text": str(tmp_path / "models" / "bert")}
    for name in ("t2i.safetensors", "t2i.bin", "official"):
        network, spec, _ = open_model(tmp_path / name, recipe=str(recipe), replacements=Replacements(**models), log=print)
        assert spec.rope == ("rowcol" if name == "official" else "legacy")
        assert torch.equal(network.to_official()["final_layer.linear.bias"], weights["final_layer.linear.bias"])
        assert opened(tmp_path / name, recipe=str(recipe), **models)("a", **SIZE)[0].size == (32, 32)
    for given, said in (
        ({"recipe": None}, r"a weight file does not describe its network: give --recipe NAME"),
        (
            {"recipe": str(recipe), "text": models["text"]},
            r"codec sd-vae needs its weights.*\(give the paths of these models with --codec",
        ),
        ({"recipe": str(recipe), "codec": models["codec"]}, r"text encoder hf needs its weights.*\(give the paths of these models with"),
        ({"recipe": "demo"}, "these weights do not fit this network"),
    ):
        with pytest.raises(ValueError, match=said):
            opened(tmp_path / "t2i.bin", **given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"--recipe demo: .* already describes its network"):
        opened(latents, recipe="demo")


def test_a_published_description_asks_for_what_it_does_not_say(tmp_path: Path) -> None:
    params = {"patch_size": 1, "in_channels": 4, "depth": 1, "hidden_size": 32, "num_heads": 2, "cap_feat_dim": 24}
    network = TransitionTransformer.from_official(params)
    save_file(network.to_official(), tmp_path / "t2i_model.safetensors")
    content = {
        "model": {"network": {"params": params}, "transport": {"target": "tim.schedulers.transports.OT_FM", "params": {"P_std": 1.6}}}
    }
    (tmp_path / "network.yaml").write_text(yaml.safe_dump(content))
    codec, encoder = autoencoder(tmp_path / "vae", "sd-vae"), bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"the codec of the weights \(4 channels\) is unknown: give --codec KIND=PATH"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"the text encoder of the weights is unknown: give --text KIND=PATH"):
        opened(tmp_path, codec=f"sd-vae={codec}")
    with pytest.raises(ValueError, match=r"--codec .*vae: give its kind, --codec KIND=.*vae; KIND is one of pixel, sd-vae"):
        opened(tmp_path, codec=str(codec))
    generator = opened(tmp_path, codec=f"sd-vae={codec}", text=f"hf={encoder}")
    assert (generator.spec.rope, generator.spec.text and generator.spec.text["max_tokens"]) == ("legacy", 256)


def test_a_model_folder_with_its_models_is_moved(latents: Path, tmp_path: Path) -> None:
    export(latents, out=tmp_path / "model", with_models=True)
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (said["codec"]["path"], said["text"]["path"]) == ("codec", "text_encoder")
    before = opened(tmp_path / "model")("a red image", **SIZE)[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").rename(tmp_path / "elsewhere" / "m")
    shutil.rmtree(tmp_path / "models")
    assert opened(tmp_path / "elsewhere" / "m")("a red image", **SIZE)[0].tobytes() == before.tobytes()
    again = Generator.from_pretrained(tmp_path / "elsewhere" / "m")("a red image", **SIZE)[0]
    assert again.tobytes() == before.tobytes()
    with pytest.raises(ValueError, match="--with-models: the published code does not read codec"):
        export(latents, out=tmp_path / "official", official=True, with_models=True)


def test_a_run_with_models_inside_is_moved(tmp_path: Path) -> None:
    codec, encoder = autoencoder(tmp_path / "run" / "vae", "sd-vae"), bert(tmp_path / "run" / "bert")
    (tmp_path / "run").rename(tmp_path / "kept")
    run = new_run(tmp_path / "run", LATENTS.replace("CODEC", str(codec)).replace("TEXT", str(encoder)))
    for part in ("vae", "bert"):
        (tmp_path / "kept" / part).rename(run / part)
    export(run, out=run / "model")
    assert json.loads((run / "model" / "config.json").read_text())["codec"]["path"] == "../vae"
    run.rename(tmp_path / "moved")
    assert read_spec(tmp_path / "moved" / "model").codec["path"] == str(tmp_path / "moved" / "vae")
    assert opened(tmp_path / "moved" / "model")("a", **SIZE)


def test_a_checkpoint_is_a_model_too(tmp_path: Path, tim: Tim) -> None:
    run = new_run(tmp_path / "run", PIXELS)
    save_checkpoint(run, step=3)
    older = run / "checkpoints" / "step-000002"
    assert [float(opened(path).network.final_layer.linear.bias[0]) for path in (older, run)] == [2.0, 3.0]
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["step-000002", "step-000003"]
    base = read_base(str(older))
    assert (base.name, base.run and base.run.train.steps) == (str(older), 2)
    done = tim("export", older, "--out", tmp_path / "model", "--json")
    assert (done.code, done.data["step"]) == (0, 2)
    assert tim("export", older, "--step", 2, "--out", tmp_path / "model").code == 0
    refused(tim("export", older, "--step", 3, "--out", tmp_path / "model"), "--step 3: .* is another step; leave it out")
    (run / "checkpoints" / "newest").mkdir()
    refused(
        tim("sample", run / "checkpoints" / "newest", "a", "--size", "8x8"), "newest: not a checkpoint; give RUN/checkpoints/step-000500"
    )


def test_two_processes_export_a_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits for the folder that the first one writes."""
    run = new_run(tmp_path / "run", PIXELS)
    folder, waited = run / "exports" / "step-000002", []
    with replaced_folder(folder) as partial:

        def other_process_ends(seconds: float) -> None:
            waited.append(seconds)
            export(run, out=tmp_path / "written")
            (tmp_path / "written").rename(folder)

        monkeypatch.setattr("launch.checkpoints.export.time.sleep", other_process_ends)
        assert model_folder(run, log=print) == folder
        shutil.copytree(folder, partial, dirs_exist_ok=True)
    assert waited == [1]


def test_models_in_other_places_are_named(latents: Path, tim: Tim, tmp_path: Path) -> None:
    export(latents, out=latents / "model")
    shutil.move(tmp_path / "models", tmp_path / "others")
    sample = ["sample", latents, "--prompt", "a red image", "--size", "32x32", "--steps", 1, "--out", tmp_path / "s"]
    refused_after_remarks(
        tim(*sample), r"models/vae: no such folder.*\(give the paths of these models with --codec, --text and --tokenizer\)"
    )
    assert not (tmp_path / "s").exists()
    refused_after_remarks(tim(*sample, "--codec", tmp_path / "others" / "vae"), r"models/bert: no such folder.*--text and --tokenizer")
    typed = ["--codec", tmp_path / "others" / "vae", "--text", f"hf={tmp_path / 'others' / 'bert'}"]
    done = tim(*sample, *typed, "--json")
    assert done.code == 0, done.err
    assert len(done.data["images"]) == 1
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        shutil.move(tmp_path / "others" / "bert" / name, tmp_path / "tokenizer" / name)
    refused_after_remarks(tim(*sample, *typed), r"has no usable tokenizer .*text\.tokenizer")
    assert tim(*sample, *typed, "--tokenizer", tmp_path / "tokenizer").code == 0


def test_another_codec_gives_images_other_names(latents: Path, tim: Tim, tmp_path: Path) -> None:
    export(latents, out=latents / "model")
    codec = autoencoder(tmp_path / "another", "sd-vae")
    sample = ["sample", latents, "a", "--size", "32x32", "--steps", 1, "--out", tmp_path / "s", "--json"]
    own = tim(*sample)
    moved = shutil.copytree(codec, tmp_path / "moved")
    other, again = (tim(*sample, "--codec", path) for path in (codec, moved))
    assert [done.data["drawn"] for done in (own, other, again)] == [1, 1, 0]
    assert own.data["images"][0]["path"] != other.data["images"][0]["path"]
