"""The command line as people meet it: help, wrong input, exit codes, JSON. In process, because importing torch takes seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from launch.checkpoints.export import spec_of
from launch.cli import COMMANDS as FUNCTIONS
from launch.cli import main
from launch.sampling.files.image_files import read_settings
from tim import TransitionTransformer
from tim.model_folder.folder import ModelSpec, save_model

COMMANDS = {function.__name__: function for function in FUNCTIONS}
PATCH = 8
CONFIG = f"""\
plan: {{max_tokens: 64, tokens_per_pack: 256, packs_per_step: 4}}
network:
  params: {{patch_size: {PATCH}, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train:
  steps: 2
"""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.out)


Tim = Callable[..., Done]


@pytest.fixture
def tim(capsys: pytest.CaptureFixture[str]) -> Tim:
    def run(*arguments: object) -> Done:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def refused(done: Done, pattern: str) -> None:
    """Wrong usage: exit code 2, one line on standard error, nothing on standard output."""
    said = "".join(line for line in done.err.splitlines(keepends=True) if not line.startswith("starting: "))  # a first import takes long
    assert done.code == 2, done
    assert done.out == ""
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(pattern, said), said


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned images and one that is not an image."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(32, 32), (32, 64), (64, 32), (48, 40), (64, 64), (40, 100)]):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image number {number}")
    (folder / "broken.jpg").write_bytes(b"this is text")
    (folder / "broken.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def corpus(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    assert main(["prepare", str(pictures), "--out", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a tiny network with random weights."""
    from launch.config.load import load_config

    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.yaml").write_text(CONFIG)
    spec: ModelSpec = spec_of(load_config(folder / "tiny.yaml"))
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
    save_model(folder / "model", network.state_dict(), spec)
    return folder / "model"


# Help


def test_help_answers_without_the_heavy_libraries() -> None:
    program = (
        "import sys, launch.cli; code = launch.cli.main(['--help']); print(code, {'torch', 'deepspeed', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("0 set()\n")
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_json_and_debug(command: str, tim: Tim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    done = tim(command, "--help")
    assert done.code == 0
    examples = [" ".join(each.split()) for each in (getdoc(COMMANDS[command]) or "").split("\n\n") if each.startswith("Example: ")]
    assert examples[0].startswith(f"Example: tim {command}")
    assert set(examples) <= {line.strip() for line in done.out.splitlines()}, "an example is one line, to be copied"
    assert "--json" in done.out
    assert "--debug" in done.out


def test_lists_of_commands_are_whole_on_80_columns(tim: Tim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["bench"]):
        commands = tim(*group, "--help").out.partition("Commands:\n")[2]
        assert commands
        assert "..." not in commands


@pytest.mark.parametrize(
    "arguments", [["paint"], ["plan"], ["plan", "a", "--rank", "2"], ["plan", "a", "--ranks", "x"], ["launch", "demo"]]
)
def test_wrong_usage_is_one_line(arguments: list[str], tim: Tim) -> None:
    refused(tim(*arguments), r"see `tim.*--help`")


# prepare and verify


def test_prepare_accounts_for_every_input_and_verify_is_clean(pictures: Path, tmp_path: Path, tim: Tim) -> None:
    done = tim("prepare", pictures, "--out", tmp_path / "c", "--json")
    assert done.code == 0
    assert (done.data["inputs"], done.data["kept"], done.data["rejected"]) == (7, 6, {"not-an-image": 1})
    checked = tim("verify", tmp_path / "c", "--json")
    assert checked.code == 0
    assert (checked.data["clean"], checked.data["samples"]) == (True, 6)


def test_an_index_of_a_corpuss_shards_is_planned_as_the_corpus(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    done = tim("index", corpus / "{000000..000001}.tar", "--out", tmp_path / "i", "--workers", "1", "--json")
    assert (done.code, done.data["kept"], done.data["rejected"], done.data["shards"]) == (0, 6, {"missing": 1}, 2)
    assert "000001.tar: missing: there is no such tar" in done.data["notes"][0]
    assert "index 2/2" in done.err
    plans = [
        tim("plan", config, f"corpus={{path: {folder}, name: c}}", "--steps", "3", "--json").data for folder in (corpus, tmp_path / "i")
    ]
    assert plans[0]["steps"] == plans[1]["steps"]
    refused(tim("index", corpus / "*.tar", "--out", corpus), "holds a corpus that `tim prepare` made")


def test_report_is_one_page_about_one_corpus_or_two(corpus: Path, tmp_path: Path, tim: Tim) -> None:
    done = tim("report", corpus, "--out", tmp_path / "r.html", "--stride", "8", "--json")
    assert (done.code, done.data["bytes"]) == (0, (tmp_path / "r.html").stat().st_size)
    assert done.data["corpora"][0]["kept"] == 6
    assert tim("report", "--compare", corpus, corpus, "--out", tmp_path / "c.html").code == 0
    assert "(A)" in (tmp_path / "c.html").read_text("utf-8")
    refused(tim("report"), "give one CORPUS, or --compare A B")
    refused(tim("report", tmp_path), "not a corpus")


def test_verify_fails_with_code_1_on_a_damaged_corpus(pictures: Path, tmp_path: Path, tim: Tim) -> None:
    tim("prepare", pictures, "--out", tmp_path / "c")
    tar = bytearray((tmp_path / "c" / "000000.tar").read_bytes())
    tar[600] ^= 255
    (tmp_path / "c" / "000000.tar").write_bytes(tar)
    (tmp_path / "c" / "index.json").unlink()
    done = tim("verify", tmp_path / "c", "--repair", "--json")
    assert done.code == 1
    assert any("000000.tar" in problem for problem in done.data["problems"])
    assert "index.json: rebuilt" in done.data["done"]
    assert done.data["lost"] == []


def test_prepare_refuses_what_it_cannot_use(pictures: Path, tmp_path: Path, tim: Tim) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    out = tmp_path / "c"
    refused(tim("prepare", "--out", out), "no source")
    refused(tim("prepare", "nothing=here", "--out", out), "nothing=here: neither a setting nor a source")
    refused(tim("prepare", "seed=1", "--out", out), "no source")
    refused(tim("prepare", tmp_path / "nowhere", "--out", out), "nowhere")
    refused(tim("prepare", tmp_path / "empty", "--out", out), "empty")
    refused(tim("prepare", pictures, "--out", tmp_path / "mine"), "mine")
    refused(tim("prepare", pictures, "--out", out, "filters.min_sied=3"), r"filters\.min_sied.*filters\.min_side")
    assert not out.exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_source_without_a_usable_image_leaves_nothing_behind(pictures: Path, tmp_path: Path, tim: Tim) -> None:
    done = tim("prepare", pictures, "--out", tmp_path / "c", "filters.min_side=4096")
    assert done.code in (1, 2)
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "c").exists()


# plan and recipes


def test_plan_says_fill_and_what_is_left_out(corpus: Path, config: Path, tim: Tim) -> None:
    done = tim("plan", config, f"corpus={corpus}", "--ranks", "2", "--steps", "3", "plan.min_tokens=20")
    assert done.code == 0
    assert re.search(r"fill +\d", done.out)
    assert re.search(r"left out +1\b", done.out)
    data = tim("plan", config, f"corpus={corpus}", "--ranks", "2", "--steps", "3", "--json").data
    assert len(data["steps"]) == 3
    assert 0 < data["fill"] <= 1


def test_plan_over_bare_sizes(tmp_path: Path, tim: Tim) -> None:
    sides = np.random.default_rng(0).integers(100, 900, (2, 5000))
    pq.write_table(pa.table({"width": sides[0], "height": sides[1]}), tmp_path / "sizes.parquet")
    options = [
        "--stride",
        "32",
        "--max-tokens",
        "400",
        "--tokens-per-pack",
        "2048",
        "--packs-per-step",
        "16",
        "--width",
        "256",
        "--gamma",
        "2",
    ]
    done = tim("plan", "--sizes", tmp_path / "sizes.parquet", *options, "--ranks", "8", "--steps", "4", "--json")
    assert done.code == 0
    assert (done.data["stride"], done.data["tokens_per_pack"], done.data["packs_per_step"], done.data["gamma"]) == (32, 2048, 16, 2)
    assert set(done.data["cost_factors"].values()) == {1}
    assert {"fill", "utilisation", "utilisation_lockstep", "samples_per_second", "left_out"} <= set(done.data)
    assert min(done.data["fill"], done.data["utilisation"], done.data["utilisation_lockstep"]) > 0.9
    keys = [key for step in done.data["steps"] for key in step["keys"]]
    assert len(set(keys)) == len(keys) > 4 * 16 * 8
    assert "█" in tim("plan", "--sizes", tmp_path / "sizes.parquet", "--steps", "1").out

    pq.write_table(pa.table({"width": [1, None]}), tmp_path / "no.parquet")
    refused(tim("plan", "--sizes", tmp_path / "no.parquet"), "columns width and height")
    refused(tim("plan", "--sizes", tmp_path / "sizes.parquet", "demo"), "cannot be combined with demo")
    refused(tim("plan", "demo", "--stride", "32"), "--stride: requires --sizes")


def test_plan_goes_on_where_a_checkpoint_stands(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    given = [config, f"corpus={corpus}"]
    ahead = tim("plan", *given, "--steps", "5", "--json").data["steps"]
    from launch.config.load import load_config
    from launch.config.schema import to_yaml
    from launch.training.planning import plan_from_config

    settings = load_config(config, overrides=[f"corpus={corpus}"])
    planner = plan_from_config(list(map(str, given)))
    for _ in range(3):
        planner.next_step()
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text(json.dumps({"data": planner.state_dict()}))
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(settings))
    (tmp_path / "run" / "latest").write_text("step-000003\n")
    for arguments in (["--from", folder], ["--from", tmp_path / "run"], [*given, "--from", folder]):
        assert tim("plan", *arguments, "--steps", "2", "--ranks", "2", "--json").data["steps"] == ahead[3:]
    assert "from step 3" in tim("plan", "--from", folder, "--steps", "2").out
    refused(tim("plan", "--from", folder, "plan.max_tokens=32"), r"plan\.max_tokens was 64 and is 32")
    refused(tim("plan", "--from", tmp_path), "neither a checkpoint nor a run")


def test_plan_and_train_refuse_what_is_wrong(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    config_with_typo = tmp_path / "typo.yaml"
    config_with_typo.write_text(CONFIG.replace("  steps: 2", "  stepz: 2"))
    refused(tim("plan", config), "corpus: missing")
    refused(tim("plan", config, f"corpus={tmp_path}"), "not a corpus")
    refused(tim("plan", "no-such-recipe", f"corpus={corpus}"), "no-such-recipe")
    refused(tim("plan", tmp_path / "no.yaml"), r"no\.yaml")
    refused(tim("plan", config_with_typo), r"typo\.yaml:5: train\.stepz: unknown key; did you mean train\.steps\?")
    refused(tim("plan", config, config), "expected one CONFIG")
    refused(tim("train", config, f"corpus={corpus}"), "run_dir: missing")
    refused(tim("train", "t2i-xl-1", f"corpus={corpus}", f"run_dir={tmp_path / 'run'}"), r"codec\.path: codec dc-ae needs its weights")
    refused(tim("plan", config, f"corpus={corpus}", "condition=class", "network.params.cap_feat_dim=null"), "6 of 6 samples have no class")
    refused(tim("train", config, f"corpus={corpus}", "train.steps=0"), r"train\.steps")
    refused(tim("launch", config, "--nproc-per-node", "2", f"corpus={corpus}", "plan.stride=5"), r"plan\.stride")
    refused(tim("launch", config, "--nproc-per-node", "2", f"corpus={corpus}"), "run_dir: missing")
    refused(tim("launch", config, "--nproc-per-node", "2", f"corpus={tmp_path}", f"run_dir={tmp_path / 'run'}"), "not a corpus")
    assert not (tmp_path / "run").exists()


def test_launch_says_what_it_would_run(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    done = tim("launch", config, "--nproc-per-node", "2", f"corpus={corpus}", f"run_dir={tmp_path / 'run'}", "--dry-run", "--json")
    assert done.code == 0
    assert "--nproc-per-node=2" in done.data["command"]
    assert not (tmp_path / "run").exists()


def test_recipes_hold_no_paths_and_load(tim: Tim) -> None:
    from launch.config.load import load_config

    names = tim("recipes", "--json").data["recipes"]
    assert {"demo", "photos"} <= set(names)
    assert all(name in tim("recipes", "list").out for name in names)
    for name in names:
        assert tim("recipes", "show", name).out.startswith("# ")
        loaded = load_config(name)
        assert not loaded.corpus
        assert loaded.run_dir is None
    refused(tim("recipes", "show", "fotos"), "photos")
    refused(tim("recipes", "show"), "expected")
    refused(tim("recipes", "demo"), "expected")


# sample and export


def test_sample_draws_each_size_and_step_count_and_a_grid(model: Path, tmp_path: Path, tim: Tim) -> None:
    arguments = ["--prompt", "a red fox", "--prompt", "", "--size", "35x16,16x32", "--steps", "1,3", "--seed", "5", "--guidance", "1"]
    done = tim("sample", model, *arguments, "--out", tmp_path / "s", "--json")
    assert done.code == 0
    images = done.data["images"]
    assert [(image["prompt"], image["width"], image["height"], image["steps"]) for image in images] == [
        (prompt, *size, steps) for prompt in ("a red fox", "") for size in ((35, 16), (16, 32)) for steps in (1, 3)
    ]
    for image in images:
        with Image.open(image["path"]) as written:
            assert written.size == (image["width"], image["height"])
        recorded = read_settings(Path(image["path"]))
        assert (recorded.prompt, recorded.steps, recorded.seed) == (image["prompt"], image["steps"], 5)
    assert Path(done.data["grid"]).name == "grid.png"
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted(
        [Path(image["path"]).name for image in images] + ["grid.png", "samples.jsonl"]
    )

    again = tim("sample", model, *arguments, "--out", tmp_path / "again", "--json").data
    assert [Path(image["path"]).read_bytes() for image in again["images"]] == [Path(image["path"]).read_bytes() for image in images]


def test_sample_says_how_often_the_network_was_asked(model: Path, tmp_path: Path, tim: Tim) -> None:
    def evaluations(*more: str) -> list[int]:
        common = ["--prompt", "a fox", "--size", "16x16", "--guidance", "2", "--negative", "a hen", "--out", tmp_path / "s", "--json"]
        return [image["evaluations"] for image in tim("sample", model, *common, *more).data["images"]]

    assert evaluations("--steps", "1,4") == [2, 8]
    assert evaluations("--times", "1,0.8,0.5,0", "--interval", "0,0.8", "--stochasticity", "0.2") == [5]


def test_sample_refuses_nonsense(model: Path, tmp_path: Path, tim: Tim) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    out = tmp_path / "s"

    def sample(*more: object, folder: Path = model, size: str = "16x16", steps: str = "1", guidance: str = "1", where: Path = out) -> Done:
        return tim("sample", folder, "--prompt", "a fox", "--size", size, "--steps", steps, "--guidance", guidance, "--out", where, *more)

    refused(tim("sample", model, "--size", "16x16", "--out", out), "--prompt TEXT, or --class ID .*neither was given")
    refused(sample("--class", "1"), "both were given")
    assert "prompt 1: this model takes text, not class ids" in tim("sample", model, "--size", "16x16", "--class", "1", "--out", out).err
    refused(sample(folder=tmp_path / "nowhere"), "no such folder")
    refused(sample(folder=tmp_path / "file"), "no such folder")
    refused(sample(folder=tmp_path / "folder"), "not a model folder or a run folder")
    refused(sample(steps="0"), "at least 1 step")
    refused(sample(steps="2,-1"), "at least 1 step")
    refused(sample(guidance="nan"), "finite")
    refused(sample(guidance="-2"), "finite")
    refused(sample(guidance="much"), "guidance")
    refused(sample(size="16"), "WIDTHxHEIGHT")
    refused(sample("--seed", "-1"), "seed")
    refused(sample("--interval", "0.8,0.2"), "--interval 0.8,0.2")
    refused(sample("--times", "0,1"), "expected two or more decreasing numbers")
    refused(sample("--times", "1,0"), "--steps 1 and --times 1,0: give one of them")
    assert tim("sample", model, "--prompt", "a fox", "--size", "16x16", "--times", "2,0", "--out", out).code == 2
    refused(sample(size="16x0"), "a side of zero pixels")
    assert sample(where=tmp_path / "file").code == 2
    assert not out.exists()


def test_a_model_that_is_damaged_is_named(model: Path, tmp_path: Path, tim: Tim) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((model / "config.json").read_bytes())
    (damaged / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:200])
    done = tim("sample", damaged, "--prompt", "a fox", "--size", "16x16", "--out", tmp_path / "s")
    assert done.code == 2
    assert "model.safetensors" in done.err.splitlines()[-1]
    assert not (tmp_path / "s").exists()


def test_export_refuses_what_is_no_run(model: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    out = tmp_path / "m"
    refused(tim("export", tmp_path / "nowhere", "--out", out), "no such folder")
    refused(tim("export", tmp_path, "--out", out), "give a run folder")
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000005").mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    refused(tim("export", run, "--out", out), "step-000005")
    refused(tim("export", run, "--out", tmp_path), "exists and is not a model folder")
    refused(tim("sample", run, "--prompt", "a fox", "--size", "16x16", "--out", tmp_path / "s"), "step-000005")
    assert not out.exists()
    assert not (tmp_path / "s").exists()
