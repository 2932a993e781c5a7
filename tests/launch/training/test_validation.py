"""Validation loss of a run in one process. Several ranks: tests/distributed/test_validation.py."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.checkpoints import checkpoint
from launch.cli import main
from launch.config.load import load_config
from launch.config.schema import Config, ConfigError
from launch.distributed.ranks import Ranks
from launch.finetuning.lora import draw_dropout
from launch.training.build import build, make_network, make_objective
from launch.training.measuring.validation import Validation
from launch.training.metrics import read_rows
from launch.training.planning import check_ready, make_planner, make_validation_plan
from launch.training.train import train
from launch.training.trainer import Trainer
from pipeline.loading.loader import Loader
from pipeline.randomness import generator, to_uniform
from tests import REPOSITORY
from tests.pipeline.conftest import varied, write_corpus
from tim import PackedText, codecs
from tim.text import encoders

CONFIG = """\
plan: {max_tokens: 24, tokens_per_pack: 64, packs_per_step: 2, flip: 0.5}
network: {params: {patch_size: 8, depth: 1, hidden_size: 16, num_heads: 1, cap_feat_dim: 16}}
objective: {diffusion_share: 0.5, consistency_share: 0.1}
train: {lr: 1.0e-2, ema: 0.5}
loader: {workers: 0}
checkpoint: {every: 3, keep_last: 9}
log: {every: 1}
"""
HELD_OUT = ["validation.share=0.4", "validation.images=7", "validation.every=3"]

Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora, and runs over the first: without validation, then with the second as images to validate on."""
    folder = tmp_path_factory.mktemp("validation")
    write_corpus(folder / "corpus", shards=[varied(20, seed=0), varied(20, seed=1)])
    write_corpus(folder / "other", shards=[varied(9, seed=2)], name="other")
    for name, overrides in {"plain": [], "other": [f"validation.corpus={folder / 'other'}", "validation.every=2"]}.items():
        train(configured(folder, name, *overrides, "train.steps=3"), quiet=True)
    train(configured(folder, "split", *HELD_OUT, "train.steps=4"), quiet=True)
    return folder


def configured(folder: Path, name: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(CONFIG)
    return load_config(path, overrides=[f"corpus={folder / 'corpus'}", f"run_dir={folder / f'run-{name}'}", *overrides])


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_rows(folder / f"run-{name}" / "metrics.jsonl")


def test_validation_does_not_change_the_training(folder: Path) -> None:
    plain, validated = rows(folder, "plain"), rows(folder, "other")
    assert [["validation_loss" in row for row in each] for each in (plain, validated)] == [[False] * 3, [False, True, True]]
    for column in ("loss", "grad_norm", "ids_digest", "lr"):
        assert [row[column] for row in validated] == [row[column] for row in plain]
    assert validated[1]["validation_images"] == 9
    for ema in (False, True):
        one, other = (checkpoint.consolidate(checkpoint.find(folder / f"run-{name}").folder, ema=ema) for name in ("plain", "other"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_that_of_every_image_alone(folder: Path) -> None:
    """Also of the average, from what the checkpoint of the same step holds."""
    config = configured(folder, "split", *HELD_OUT, "train.steps=4")
    plan = make_validation_plan(config, make_planner(config))
    reader = Loader(plan, seed=1, channels=3, factor=1, workers=0)
    objective = make_objective(config, pixels_per_cell=1, ranks=Ranks(rank=0, size=1, device=torch.device("cpu")))
    encoder, codec, network = encoders.make("lookup", width=16), codecs.make("pixel"), make_network(config.network)
    saved = checkpoint.find(folder / "run-split", step=3).folder
    row = rows(folder, "split")[2]
    for ema, suffix in ((False, ""), (True, "_ema")):
        network.load_state_dict(checkpoint.consolidate(saved, ema=ema))
        losses = {name: [] for name in ("diffusion", "consistency", "transition")}
        for sample in (sample for pack in plan.packs for sample in pack.samples):
            batch = reader.read_pack((sample,))
            shape = 3, sample.height, sample.width
            noise = torch.from_numpy(generator(0, "noise", 0, sample.id).standard_normal(shape, dtype="float32"))
            uniforms = torch.tensor(to_uniform(generator(0, "times", 0, sample.id).integers(0, 2**64, 2, dtype="uint64")))[None]
            latents, condition = codec.encode(batch.images)[0], PackedText.from_features(encoder.encode(batch.captions))
            for kind, of_kind in enumerate(losses.values()):
                given = {"noise": [noise], "kinds": torch.tensor([kind]), "uniforms": uniforms, "weights": torch.ones(1)}
                with torch.no_grad():
                    of_kind.append(float(objective(network, latents, condition, **given).raw))
        means = {name: sum(of_kind) / len(of_kind) for name, of_kind in losses.items()}
        assert len(losses["diffusion"]) == row["validation_images"] == 7
        for name, mean in means.items():
            assert row[f"validation_loss_{name}{suffix}"] == pytest.approx(mean, rel=1e-5)
        mixed = 0.5 * means["diffusion"] + 0.1 * means["consistency"] + 0.4 * means["transition"]
        assert row[f"validation_loss{suffix}"] == pytest.approx(mixed, rel=1e-5)
    assert row["validation_loss"] != row["validation_loss_ema"]


def test_an_older_run_keeps_its_plan_and_a_share_is_another_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"corpus corpus: validation\.share was None and is 0\.4: restore the settings, or add --replan"):
        train(configured(folder, "plain", *HELD_OUT, "train.steps=4"), quiet=True)
    with pytest.raises(ConfigError, match=r"corpus corpus: validation\.share was 0\.4 and is 0\.5: restore the settings, or add --replan"):
        train(configured(folder, "split", "validation.share=0.5", "train.steps=5"), quiet=True)
    train(configured(folder, "plain", f"validation.corpus={folder / 'other'}", "train.steps=4"), quiet=True)
    train(configured(folder, "plain", *HELD_OUT, "train.steps=5"), replan=True)
    assert "validation.share was None and is 0.4" in capsys.readouterr().err
    assert ["validation_loss" in row for row in rows(folder, "plain")] == [False, False, False, True, True]


def test_the_plan_counts_the_split(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(folder / "run.yaml"), f"corpus={folder / 'corpus'}", "train.steps=1", "validation.share=0.4", "--steps", "2"]
    main(arguments)
    held_out = make_planner(configured(folder, "split", *HELD_OUT, "train.steps=4")).sample_counts["left_out"]["validation"]
    assert held_out > 7
    assert f"left out         {held_out}, validation {held_out}" in capsys.readouterr().out


def test_seconds_are_counted_where_they_are_spent(folder: Path) -> None:
    """A checkpoint after step 3 is in the row of step 4."""
    found = rows(folder, "split")
    assert all(row[f"seconds_{name}"] > 0 for row in found for name in ("data", "compute", "optimizer"))
    assert [row["seconds_validation"] > 0 for row in found] == [False, False, True, True]
    assert [row["seconds_save"] > 0 for row in found] == [False, False, False, True]


def test_every_column_of_a_row_is_documented(folder: Path) -> None:
    table = (REPOSITORY / "docs" / "training.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    written = {name for run in ("split", "other") for row in rows(folder, run) for name in row}
    generic = {re.sub(r"_tokens_\d+", "_tokens_N", name).replace("_ema", "") for name in written}
    assert generic == {name.replace("_ema", "") for name in names}


def test_what_cannot_be_validated_is_found_before_the_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.share: give either the share of the corpus, or validation\.corpus"):
        configured(folder, "bad", "validation.every=3")
    with pytest.raises(ConfigError, match=r"weight, repeats and cap have no effect here"):
        configured(folder, "bad", f"validation.corpus={{path: {folder / 'other'}, repeats: 2}}")
    same = folder / "corpus" / ".." / "corpus"
    few = [f"validation.corpus={{path: {same}, where: 'width < 40'}}", "train.steps=1"]
    with pytest.raises(ConfigError, match=r"validation\.corpus: \d+ of its images are trained on, as part of corpus corpus: select others"):
        check_ready(configured(folder, "bad", *few))
    check_ready(configured(folder, "bad", *few, f"corpus={{path: {folder / 'corpus'}, where: 'width >= 40'}}"))
    with pytest.raises(ValueError, match="none of the 40 samples of corpus is selected"):
        check_ready(configured(folder, "bad", "validation.share=1e-6", "train.steps=1"))


def without_clock(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs between two runs of the same steps."""
    return [
        {name: value for name, value in row.items() if "second" not in name and name not in ("time", "restarts", "peak_memory_host")}
        for row in found
    ]


@pytest.mark.parametrize("ends", ["by a signal", "by an error"])
def test_a_validation_that_is_interrupted_is_done_again_after_the_save(folder: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """The checkpoint of its step does not wait for it. The rows are those of the run that was not interrupted."""
    run = folder / f"run-{ends}"
    saves, measured, of_pack = [], [], Validation._of_pack

    def interrupted(self: Validation, *arguments: Any, **options: Any) -> Any:
        saves.append([path.name[:11] for path in (run / "checkpoints").iterdir()])
        measured.append(None)
        if ends == "by an error":
            raise RuntimeError("the network fails")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # another thread receives it
        return of_pack(self, *arguments, **options)

    monkeypatch.setattr(Validation, "_of_pack", interrupted)
    config = configured(folder, ends, *HELD_OUT, "train.steps=4")
    with pytest.raises(RuntimeError if ends == "by an error" else SystemExit):
        train(config, quiet=True)
    assert saves == [["step-000003"]]
    assert ["validation_loss" in row for row in rows(folder, ends)] == [False] * 3
    monkeypatch.undo()
    train(config, quiet=True)
    assert without_clock(rows(folder, ends)) == without_clock(rows(folder, "split"))
    assert rows(folder, ends)[2]["seconds_validation"] > 0


def test_a_validation_without_a_readable_image_has_no_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "other", folder / "damaged", dirs_exist_ok=True)
    tar = folder / "damaged" / "000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    given = [f"validation.corpus={folder / 'damaged'}", "validation.every=1", "loader.max_bad_fraction=1", "train.steps=2"]
    train(configured(folder, "damaged", *given))
    assert capsys.readouterr().err.count("warning: step 1 has no validation loss: none of its images can be read") == 1
    for row in rows(folder, "damaged"):
        found = {name: value for name, value in row.items() if name.startswith("validation")}
        assert found.pop("validation_images") == 0
        assert {"validation_loss", "validation_loss_transition", "validation_loss_ema"} <= found.keys()
        assert set(found.values()) == {None}


@pytest.mark.parametrize("packs", [0, 1, 4])
def test_a_stopped_validation_gives_no_number_and_leaves_the_weights(folder: Path, alone: Ranks, packs: int) -> None:
    """Also while the average is measured."""
    config = configured(folder, "stopped", *HELD_OUT, "train.steps=4", "plan.tokens_per_pack=64")
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        trainer.take_step()
        engine, average = trainer.parts.engine, trainer.parts.ema.average
        held = [fragment.values for fragments in (engine.fragments(), average) for fragment in fragments.values()]
        before = [values.clone() for values in held]
        asked = iter([False] * packs + [True])
        assert trainer.validate(last=True, stopping=lambda: next(asked)) == {}
        assert next(asked, None) is None
        assert all(torch.equal(one, other) for one, other in zip(before, held, strict=True))
        assert engine.module.training
        complete = trainer.validate(last=True, stopping=bool)
        assert complete["validation_images"] == 7
        assert complete["validation_loss"] != complete["validation_loss_ema"]


def test_adapters_are_validated_without_dropout(folder: Path, alone: Ranks) -> None:
    config = configured(folder, "dropout", *HELD_OUT, "train.steps=4", "train.lora={rank: 2, dropout: 0.5}")
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        trainer.take_step()
        validation = trainer.parts.validation
        assert validation is not None
        measured = []
        for step in (7, 8):
            draw_dropout(trainer.parts.engine.module, seed=0, step=step)
            measured.append(validation.measure(1, stopping=bool))
        assert measured[0] == measured[1]
        assert trainer.parts.engine.module.training
