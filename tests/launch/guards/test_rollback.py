"""After a loss spike a run goes back to its last checkpoint's weights, and on with the next step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.saving.background import BackgroundSaver
from launch.config.load import load_config
from launch.config.schema import Config
from launch.distributed.ranks import Ranks
from launch.guards.loss_spikes import MIN_STEPS, STEPS_IN_A_ROW
from launch.training.build import build
from launch.training.planning import make_planner
from launch.training.trainer import Trainer
from pipeline.planning.config import Stage
from tests.pipeline.conftest import Sample, write_corpus

CONFIG = """\
corpus: {corpus}
run_dir: {run}
condition: class
plan: {{max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}}
network:
  params: {{patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, num_classes: 3, class_dropout_prob: 0.1}}
train: {{steps: 200, lr: 1e-3, ema: 0.9, spike: rollback, max_rollbacks: 1}}
loader: {{workers: 0}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    corpus = write_corpus(tmp_path / "corpus", shards=[[Sample(20 + 7 * i, 60 - 4 * i, (), i % 3) for i in range(8)]])
    (tmp_path / "run.yaml").write_text(CONFIG.format(corpus=corpus.path, run=tmp_path / "run"))
    (tmp_path / "run").mkdir()
    return load_config(tmp_path / "run.yaml")


def disturb(trainer: Trainer) -> None:
    """Ruin the weights, as a bad update would."""
    fragments = trainer.parts.engine.fragments()
    for fragment in fragments.values():
        fragment.values.mul_(-4)
    state = {name: fragments[name].values.reshape(value.shape) for name, value in trainer.parts.engine.module.state_dict().items()}
    trainer.parts.engine.module.load_state_dict(state)


def save(trainer: Trainer) -> None:
    config = trainer.config
    assert config.run_dir is not None
    with BackgroundSaver(config.run_dir, config.checkpoint, ranks=trainer.ranks, log=lambda line: None) as saver:
        trainer.save(saver)
        saver.finish()


def run_until(trainer: Trainer, step: int, *, before: Callable[[], None] = lambda: None) -> None:
    while trainer.step < step:
        before()
        trainer.take_step()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: fragment.values.clone() for name, fragment in trainer.parts.engine.fragments().items()}


def test_a_spike_takes_the_weights_back_and_not_the_plan(config: Config, alone: Ranks) -> None:
    assert config.run_dir is not None
    lines: list[str] = []
    saved_at, hit_at = MIN_STEPS + 8, MIN_STEPS + 12
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        trainer.log = lines.append
        run_until(trainer, saved_at)
        save(trainer)
        before, updates = weights(trainer), trainer.parts.engine.updates
        run_until(trainer, hit_at)
        disturb(trainer)
        run_until(trainer, hit_at + STEPS_IN_A_ROW)
        assert len(lines) == 1
        assert lines[0].startswith(f"warning: loss spike at step {trainer.step}: loss_")
        assert lines[0].endswith(f"; went back to the weights of step {saved_at}; training goes on with step {trainer.step + 1}")
        assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
        assert trainer.parts.engine.updates == updates
        assert (trainer.meter.total("loss_spikes"), trainer.meter.total("rollbacks")) == (1, 1)
        position = trainer.parts.loader.state_dict()
        run_until(trainer, trainer.step + 5)
        after = weights(trainer)

    # An equal run from these weights at this position of the plan goes the same way.
    with ExitStack() as cleanup:
        other = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        found = checkpoint.newest(config.run_dir)
        assert found is not None
        other._load_weights(found, checkpoint.read_trainer_state(found.folder))
        other.parts.loader.load_state_dict(position)
        other.step = hit_at + STEPS_IN_A_ROW
        run_until(other, other.step + 5)
        assert all(torch.equal(value, after[name]) for name, value in weights(other).items())


def test_spikes_without_end_stop_the_run(config: Config, alone: Ranks) -> None:
    assert config.run_dir is not None
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        run_until(trainer, MIN_STEPS + 8)
        save(trainer)
        with pytest.raises(RuntimeError, match=r"loss spike at step \d+ after 1 rollbacks: .*: lower train\.lr"):
            run_until(trainer, trainer.step + 10, before=lambda: disturb(trainer))


@pytest.mark.parametrize("spike", ["warn", "rollback"])
def test_without_a_checkpoint_or_when_not_asked_it_only_warns(config: Config, alone: Ranks, spike: str) -> None:
    config = load_config(config.run_dir.parent / "run.yaml", overrides=[f"train.spike={spike}"]) if config.run_dir else config
    lines: list[str] = []
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        trainer.log = lines.append
        run_until(trainer, MIN_STEPS + 8)
        disturb(trainer)
        run_until(trainer, trainer.step + 10)
    assert len(lines) == 1
    assert lines[0].endswith("there is no checkpoint to go back to") == (spike == "rollback")


def test_a_stage_of_the_schedule_starts_with_an_empty_window(config: Config, alone: Ranks) -> None:
    """Its losses are of other shares and sizes."""
    changes = MIN_STEPS + 8
    stage = Stage(step=changes, diffusion_share=0.9)
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"schedule": (stage,)})})
    with ExitStack() as cleanup:
        trainer = Trainer(config, build(config, make_planner(config), ranks=alone, cleanup=cleanup), ranks=alone)
        lines: list[str] = []
        trainer.log = lines.append
        run_until(trainer, changes)
        disturb(trainer)
        run_until(trainer, changes + 2 * STEPS_IN_A_ROW)
        assert lines == []
