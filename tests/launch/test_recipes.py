"""Every recipe can be launched: config, corpus, models and plan fit together. Nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from launch.cli import main
from launch.config.load import load_config
from launch.config.recipes import recipe_names

NATIVE = {"t2i-native": 16, "t2i-native-1x8": 8, "t2i-native-8x8": 64}  # recipe → number of GPUs


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus in eight shards, with captions and classes, and with what recipes need besides."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "source").mkdir()
    rows = []
    for number in range(8):
        Image.fromarray(np.full((64, 64 + 32 * number, 3), 30 * number, dtype=np.uint8)).save(folder / "source" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"image number {number}", "label": number})
    (folder / "source" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare([str(folder / "source")], out=folder / "corpus", config=PrepareConfig.model_validate({"shards": {"max_samples": 1}}))
    for kind in ("dc-ae", "sd-vae", "hf"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text("{}")
        (folder / kind / "model.safetensors").touch()
    (folder / "hf" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "image", "number"]))
    (folder / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (folder / "radio.pth").touch()
    return folder


def overrides(recipe: str, parts: Path) -> list[str]:
    """What a recipe leaves to the command line."""
    config = load_config(recipe)
    given = [f"corpus={parts / 'corpus'}", f"run_dir={parts / 'run'}"]
    given += [f"codec.path={parts / config.codec.kind}"] * (config.codec.kind != "pixel")
    given += [f"text.path={parts / config.text.kind}"] * (config.condition == "text" and config.text.kind != "lookup")
    given += [f"train.init={parts / 'radio.pth'}"] * (config.train.lora is not None)
    return given + [f"objective.alignment.path={parts / 'radio.pth'}"] * (config.objective.alignment is not None)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_can_be_launched(recipe: str, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--nproc-per-node", "8", "--slurm", "--nnodes", "8"] if recipe.endswith("8x8") else ["--nproc-per-node", "2"]
    assert main(["launch", recipe, *layout, "--dry-run", "--json", *overrides(recipe, parts)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert recipe in said.get("command", said.get("script"))
    assert not (parts / "run").exists()


@pytest.mark.parametrize(("recipe", "gpus"), NATIVE.items())
def test_native_recipes_grow_to_4096_pixels(recipe: str, gpus: int) -> None:
    config = load_config(recipe)
    sizes = [config.plan.max_tokens, *(stage.max_tokens for stage in config.plan.schedule)]
    assert [round(tokens**0.5) * 32 for tokens in sizes if tokens] == [256, 512, 1024, 2048, 4096]
    assert config.objective.shift == 1024
    assert config.plan.packs_per_step == gpus
    steps = [0, *(stage.step for stage in config.plan.schedule), config.train.steps]
    assert steps == sorted(set(steps))
    assert not [step for step in steps if step % (config.checkpoint.keep_every or 1)], "the end of every stage is kept"
