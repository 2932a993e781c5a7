"""Runs that go on although their data or batch has changed, and runs that begin with weights. One process, a network of 0.1M parameters."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launch.checkpoints import checkpoint, history
from launch.checkpoints.export import export
from launch.cli import main
from launch.config.load import load_config
from launch.config.schema import ConfigError
from launch.training.metrics import read_rows
from launch.training.planning import plan_from_checkpoint
from launch.training.train import train
from launch.training.trainer import Trainer
from tests.pipeline.conftest import varied, write_corpus
from tim.model_folder.folder import load_model

CONFIG = """\
plan: {max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}
network: {params: {patch_size: 8, depth: 1, hidden_size: 16, num_heads: 1, cap_feat_dim: 16}}
train: {steps: 4, lr: 1.0e-3, ema: 0.9}
loader: {workers: 0}
checkpoint: {every: 2, keep_last: 9}
log: {every: 1}
"""

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a config and a run of four steps."""
    folder = tmp_path_factory.mktemp("begun")
    write_corpus(folder / "corpus", shards=[varied(12, seed=0)])
    (folder / "run.yaml").write_text(CONFIG)
    train(load_config(folder / "run.yaml", overrides=[f"corpus={folder / 'corpus'}", f"run_dir={folder / 'run'}"]), quiet=True)
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Run:
    """Goes on with a copy of that run: `run("key=value", …, replan=True)` gives back its folder."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)

    def go_on(*overrides: str, replan: bool = False, name: str = "run") -> Path:
        places = [f"corpus={tmp_path / 'corpus'}", f"run_dir={tmp_path / name}", "train.steps=6"]
        train(load_config(tmp_path / "run.yaml", overrides=[*places, *overrides]), replan=replan)
        return tmp_path / name

    return go_on


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.consolidate(checkpoint.find(folder, step=step).folder, ema=False)


def rows(folder: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["ids_digest"], row["loss"], row["lr"]) for row in read_rows(folder / "metrics.jsonl")]


def grow(folder: Path) -> list[str]:
    write_corpus(folder / "corpus", shards=[varied(12, seed=0), varied(5, seed=1)])
    return []


def exclude(folder: Path) -> list[str]:
    pq.write_table(pa.table({"key": ["0000000001", "0000000003"]}), folder / "out.parquet")
    return [f"corpus={{path: {folder / 'corpus'}, exclude: {folder / 'out.parquet'}}}"]


CHANGES = {
    "corpus corpus: had 12 samples and has 17, 5 added": grow,
    "corpus corpus: exclude had no keys and has 2": exclude,
    "plan.tokens_per_pack was 64 and is 96": lambda _: ["plan.tokens_per_pack=96"],
    "plan.packs_per_step was 2 and is 3": lambda _: ["plan.packs_per_step=3"],
    "plan.schedule was [] and is [{step: 5, max_tokens: 9}]": lambda _: ["plan.schedule=[{step: 5, max_tokens: 9}]"],
    "text.caption_dropout was 0.1 and is 0.2": lambda _: ["text.caption_dropout=0.2"],
    "text.caption_weights was [1.0] and is [1.0, 0.0]": lambda _: ["text.caption_weights=[1, 0]"],
    "objective.diffusion_share was 0.5 and is 0.6": lambda _: ["objective.diffusion_share=0.6"],
    "seed was 0 and is 1": lambda _: ["seed=1"],
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_change_of_the_plan_is_refused_by_name_and_replanned(
    said: str, run: Run, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = CHANGES[said](tmp_path)
    if "step: 5" not in said:
        monkeypatch.setattr(Trainer, "take_step", lambda *_, **__: pytest.fail("no step is left"))
        overrides.append("train.steps=4")
    with pytest.raises(ConfigError) as refused:
        run(*overrides)
    assert said in str(refused.value)
    assert "add --replan to resume from step 4" in str(refused.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == (begun / "run" / "config.yaml").read_text()
    folder = run(*overrides, replan=True)
    line = f"step 4: replanned, because {said}"
    assert line in capsys.readouterr().err
    assert f"# {line}\n" in (folder / "config.yaml").read_text()
    assert [str(each) for each in history.read(folder).replans] == [line]


def test_replanning_as_it_is_typed(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tim plan` shows what would begin, and `tim launch` hands the flag to its ranks."""
    changed = ["plan.tokens_per_pack=96", f"corpus={begun / 'corpus'}", f"run_dir={begun / 'run'}"]
    look = ["plan", "--from", str(begun / "run"), changed[0], "--steps", "2", "--json"]
    with pytest.raises(SystemExit, match="2"):
        main(look)
    assert "plan.tokens_per_pack was 64 and is 96" in capsys.readouterr().err
    assert main([*look, "--replan"]) == 0
    assert json.loads(capsys.readouterr().out)["samples_per_step"] > 0
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(begun / "run.yaml"), *changed[1:], "--replan"])
    assert "--replan: requires --from CHECKPOINT" in capsys.readouterr().err
    assert main(["launch", str(begun / "run.yaml"), *changed, "--nproc-per-node", "2", "--replan", "--dry-run"]) == 0
    assert "--replan" in shlex.split(capsys.readouterr().out)


def test_a_replanned_run_keeps_its_weights_and_is_resumed_exactly(
    run: Run, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ["plan.tokens_per_pack=96", "train.steps=8"]
    unbroken = run(*changed, replan=True)
    whole = rows(unbroken)
    assert whole[:4] == rows(begun / "run")
    assert [row[0] for row in whole] == list(range(1, 9))
    ids = [row["first_ids"] for row in read_rows(unbroken / "metrics.jsonl")]
    assert ids[4:] != ids[:4]
    assert all(torch.equal(value, weights(begun / "run", 4)[name]) for name, value in weights(unbroken, 4).items())

    shutil.rmtree(unbroken / "checkpoints" / "step-000006")  # as if killed before it: history.json alone knows of the replan
    shutil.rmtree(unbroken / "checkpoints" / "step-000008")
    (unbroken / "latest").write_text("step-000004\n")
    planner = plan_from_checkpoint(unbroken, arguments=[])
    assert list(planner.next_step().ids)[:4] == ids[4]
    capsys.readouterr()
    run(*changed[:1])
    assert "step 4: replanned" in capsys.readouterr().err
    run(*changed, replan=True)
    assert "--replan: no effect, the inputs of the plan have not changed" in capsys.readouterr().err
    assert rows(unbroken) == whole
    state = checkpoint.read_trainer_state(unbroken / "checkpoints" / "step-000008")
    assert [each["step"] for each in state["history"]["replans"]] == [4]
    with pytest.raises(ConfigError, match=r"plan\.tokens_per_pack was 96 and is 64"):
        run("train.steps=9")


def test_a_change_that_weights_hang_on_stays_refused(run: Run) -> None:
    for override, key in (("network.params.depth=2", r"network\.params\.depth"), ("text.max_tokens=9", r"text\.max_tokens")):
        with pytest.raises(ConfigError, match=f"{key} was .*the run's weights do not fit"):
            run(override, replan=True)
    with pytest.raises(ConfigError, match=r"train\.optimizer=adamw, not muon: resume with the same optimizer"):
        run("train.optimizer=muon", replan=True)


def test_a_run_begins_with_weights(run: Run, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model folder, a run, the file in it, and one for the published code: the average that sampling sees."""
    averaged = checkpoint.consolidate(checkpoint.find(begun / "run").folder, ema=True)
    export(begun / "run", out=tmp_path / "official", official=True)
    sources = [
        begun / "run" / "model",
        begun / "run",
        begun / "run" / "model" / "model.safetensors",
        tmp_path / "official" / "model.safetensors",
    ]
    starts = []
    for number, source in enumerate(sources):
        folder = run(f"train.init={source}", "train.steps=1", "train.lr=1e-12", name=f"new{number}")
        starts.append(folder)
        for ema in (False, True):
            found = checkpoint.consolidate(checkpoint.find(folder).folder, ema=ema)
            for name, value in averaged.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)
        assert f"initialized from {len(averaged)} tensors of {source} (sha256 " in capsys.readouterr().err
        init = history.read(folder).init
        assert init is not None
        assert (init.path, init.loaded, init.not_loaded, init.not_used) == (str(source), len(averaged), (), ())
        assert f"# initialized from {len(averaged)} tensors of {source}" in (folder / "config.yaml").read_text()
    first = starts[0]
    assert history.read(starts[1]) != history.read(first)

    run("train.init=gone/for/good", "train.steps=2", name="new0")  # a resume does not look at it
    assert "initialized from" not in (said := capsys.readouterr().err)
    assert "changed since: train.init" in said
    assert history.read(first).init is not None
    assert checkpoint.read_trainer_state(checkpoint.find(first).folder)["history"]["init"]["loaded"] == len(averaged)


def test_weights_of_another_network_are_refused_or_loaded_as_far_as_they_fit(
    run: Run, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = begun / "run" / "model"
    init = f"train.init={model}"
    for override, said in (
        ("network.params.depth=2", r"network\.params\.depth 1, this run has 2"),
        ("network.params.num_heads=2", r"network\.params\.num_heads 1, this run has 2"),
        ("network.rope=centred", r"network\.rope rowcol, this run has centred"),
    ):
        with pytest.raises(ConfigError, match=f"train.init: {model} holds another network: {said}: .*init_strict=false"):
            run(init, override, name="new")
    with pytest.raises(ConfigError, match=r"train\.init: .*wrong shapes: .*missing keys: .*init_strict=false"):
        run(f"{init}/model.safetensors", "network.params.depth=2", "network.params.patch_size=4", name="new")
    with pytest.raises(ConfigError, match=r"train\.init: nowhere: no such folder or weight file"):
        run("train.init=nowhere", name="new")
    with pytest.raises(ConfigError, match=r"train\.init: .*corpus: not a model folder or a run folder, and has no weight file"):
        run(f"train.init={tmp_path / 'corpus'}", name="new")

    capsys.readouterr()
    folder = run(init, "train.init_strict=false", "network.params.depth=2", "train.steps=1", "train.lr=1e-12", name="new")
    said = capsys.readouterr().err
    loaded = history.read(folder).init
    assert loaded is not None
    assert all(name.startswith("blocks.1.") for name in loaded.not_loaded)
    assert f"{len(loaded.not_loaded)} stay randomly initialized: blocks.1." in said
    assert f"and {len(loaded.not_loaded) - 10} more" in said
    assert f"{model} was trained with network.params.depth 1, this run has 2" in said
    network, _ = load_model(model)
    for name, value in weights(folder, 1).items():
        if name not in loaded.not_loaded:
            torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=1e-9)


def test_a_changed_loss_weight_is_logged_and_needs_no_replan(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = rows(run(name="run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    (tmp_path / "run" / "latest").write_text("step-000004\n")
    capsys.readouterr()
    found = rows(run(f"corpus={{path: {tmp_path / 'corpus'}, loss_weight: 0.5}}"))
    assert "changed since the checkpoint: corpus corpus: loss_weight was 1 and is 0.5" in capsys.readouterr().err
    assert [row[:2] for row in found] == [row[:2] for row in kept]  # steps and samples
