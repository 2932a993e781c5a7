"""A sample that makes the loss non-finite is left out of its step, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.config.load import load_config
from launch.config.schema import Config
from launch.distributed.ranks import Ranks
from launch.guards.bad_samples import FILE, blank, forget_after, one_sample
from launch.training.build import build
from launch.training.planning import make_planner
from launch.training.trainer import Trainer
from pipeline.loading.loader import LoadedStep
from tests.pipeline.conftest import Sample, write_corpus
from tests.pipeline.features.feature_writer import write_features
from tim import codecs

CONFIG = """\
corpus: {{path: {corpus}, features: {features}}}
run_dir: {run}
condition: class
plan: {{max_tokens: 16, tokens_per_pack: 32, packs_per_step: 4}}
network:
  params: {{patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, num_classes: 3, class_dropout_prob: 0.1}}
objective:
  guidance: {{interval: [0, 1], after: 1, refresh: 1}}
train: {{steps: 3, lr: 1e-2, ema: 0.5}}
loader: {{workers: 0, max_bad_fraction: 0.5}}
log: {{every: 1}}
"""


def write_run(folder: Path, *, bad: tuple[int, ...]) -> Path:
    """A config of a corpus with cached latents, those of some of its eight samples NaN. Sizes tell the samples apart."""
    samples = [Sample(20 + 7 * i, 60 - 4 * i, (), i % 3) for i in range(8)]
    corpus = write_corpus(folder / "corpus", shards=[samples])
    codec = codecs.make("pixel")
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(corpus=corpus.path, features=folder / "features", run=folder / "run"))
    rule = make_planner(load_config(path, overrides=[f"corpus={corpus.path}"])).plan.size_rule
    remaining = iter(range(8))

    def encode(images: Sequence[Tensor]) -> list[Tensor]:
        [latent] = codec.encode(images).means
        return [latent * float("nan") if next(remaining) in bad else latent]

    metadata = {"kind": "pixel", "factor": codec.factor, "channels": codec.channels}
    write_features(folder / "features", corpus, rules=[rule], codec=metadata, encode_images=encode, text=None, encode_texts=lambda _: [])
    return path


def steps_of(config: Config, alone: Ranks, *, blanked: str | None = None) -> tuple[Trainer, list[tuple[float, ...]], list[str]]:
    """Three steps: losses and gradient norms, and lines of the log. `blanked`: a sample that is blank from the start."""
    lines: list[str] = []
    assert config.run_dir is not None
    config.run_dir.mkdir(exist_ok=True)
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        trainer.log = lines.append
        if blanked:
            trainer._steps = without(blanked, iter(trainer.parts.loader))
        measures = [trainer.take_step() for _ in range(3)]
        return trainer, [(*measure.raw, measure.grad_norm, measure.failed, measure.images) for measure in measures], lines


def without(id: str, steps: Iterator[LoadedStep]) -> Iterator[LoadedStep]:
    for step in steps:
        places = [{place for place, name in enumerate(batch.ids) if name == id} for batch in step.batches]
        yield replace(step, batches=[blank(batch, where, patch_size=8) for batch, where in zip(step.batches, places, strict=True)])


def test_a_bad_sample_is_recorded_and_its_place_is_left_empty(tmp_path: Path, alone: Ranks) -> None:
    for name, bad in (("good", ()), ("bad", (3,))):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, bad=bad)
    good, config = (load_config(tmp_path / name / "run.yaml") for name in ("good", "bad"))
    victim = "corpus/0000000003"
    _, expected, _ = steps_of(good, alone, blanked=victim)
    trainer, found, lines = steps_of(config, alone)
    assert found == expected
    assert all(failed > 0 for *_, failed, _ in found)
    rows = [json.loads(line) for line in (tmp_path / "bad/run" / FILE).read_text().splitlines()]
    assert {(row["id"], row["reason"]) for row in rows} == {(victim, "the loss is nan")}
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert trainer.meter.total("bad_samples") == trainer.meter.total("failed") == len(rows) == trainer.parts.loader.samples_failed
    assert lines[0].startswith(f"warning: left out of step 1: {victim}")
    assert lines[0].endswith(f": the loss is nan; see {FILE}")
    forget_after(tmp_path / "bad/run", step=1)
    assert {json.loads(line)["step"] for line in (tmp_path / "bad/run" / FILE).read_text().splitlines()} == {1}


def test_too_many_bad_samples_stop_the_run(tmp_path: Path, alone: Ranks) -> None:
    path = write_run(tmp_path, bad=(1, 4))
    with pytest.raises(RuntimeError, match=r"samples could not be used, more than max_bad_fraction 0 allows"):
        steps_of(load_config(path, overrides=["loader.max_bad_fraction=0"]), alone)


def test_a_network_that_is_not_finite_is_not_blamed_on_samples(tmp_path: Path, alone: Ranks) -> None:
    config = load_config(write_run(tmp_path, bad=()), overrides=["train.max_skips=3", "loader.max_bad_fraction=0"])
    lines: list[str] = []
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        trainer.log = lines.append
        trainer.take_step()
        for fragment in trainer.parts.engine.fragments().values():
            fragment.values.fill_(float("nan"))
        trainer.parts.engine.module.load_state_dict(
            {name: value * float("nan") for name, value in trainer.parts.engine.module.state_dict().items()}
        )
        trainer.take_step()
        trainer.take_step()
        with pytest.raises(RuntimeError, match=r"the gradient was not finite in the 3 steps up to 4: lower train\.lr"):
            trainer.take_step()
        assert trainer.parts.engine.updates == 1
    assert len(lines) == 3
    assert all("skipped, its gradient is not finite; its samples: corpus/" in line for line in lines)
    assert not (tmp_path / "run" / FILE).exists()


def test_packs_of_one_sample_and_blanks_have_the_shapes_of_the_pack(tmp_path: Path, alone: Ranks) -> None:
    config = load_config(write_run(tmp_path, bad=()))
    with ExitStack() as cleanup:
        parts = build(config, make_planner(config), ranks=alone, cleanup=cleanup)
        with closing(parts.loader) as loader:
            batch = max(next(iter(loader)).batches, key=lambda batch: len(batch.ids))
    batch = replace(batch, teacher=torch.randn(sum(noise[0].numel() // 64 for noise in batch.noise), 5))
    assert batch.latents is not None
    assert batch.teacher is not None
    alone_batches = [one_sample(batch, place, patch_size=8) for place in range(len(batch.ids))]
    assert [one.ids for one in alone_batches] == [[id] for id in batch.ids]
    assert torch.equal(torch.cat([one.teacher for one in alone_batches if one.teacher is not None]), batch.teacher)
    assert sum(one.tokens for one in alone_batches) == batch.tokens
    assert all(torch.equal(one.uniforms[0], batch.uniforms[place]) for place, one in enumerate(alone_batches))
    emptied = blank(batch, {1}, patch_size=8)
    assert emptied.latents is not None
    assert [bool(latent.any()) for latent in emptied.latents] == [place != 1 for place in range(len(batch.ids))]
    assert emptied.weights.tolist() == [float(place != 1) for place in range(len(batch.ids))]
    assert blank(batch, set(), patch_size=8) is batch
