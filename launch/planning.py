"""A run's planner, as its config describes it: what `tim plan` shows is what `tim train` does."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from launch.config import Config, ConfigError
from pipeline.index import Corpus
from pipeline.planner import Planner


def make_planner(config: Config) -> Planner:
    """Open the corpora and plan over them.

    Raises:
        ValueError: no corpus is given, one is none, lacks the classes that it is to be trained with, or the plan is impossible.
    """
    if not config.corpus:
        raise ConfigError("corpus: missing; give it in the file, or as corpus=PATH on the command line")
    corpora = [Corpus.open(source.path, name=source.name) for source in config.corpus]
    if config.network.params.num_classes is not None:
        for corpus in corpora:
            _check_classes(corpus, classes=config.network.params.num_classes)
    return Planner(
        corpora,
        plan=config.plan,
        seed=config.seed,
        width=config.network.params.hidden_size,
        diffusion_share=config.objective.diffusion_share,
        consistency_share=config.objective.consistency_share,
        caption_dropout=config.condition_dropout,
    )


def check_ready(config: Config) -> Path:
    """Refuse once, before any training process is started, what each of them would refuse. Returns the run_dir.

    Raises:
        ValueError: no run_dir, corpus or teacher's weights are given, a corpus is none, the codec cannot be run, or the plan is
            impossible.
    """
    if config.run_dir is None:
        raise ConfigError("run_dir: missing; give it in the file, or as run_dir=PATH on the command line")
    check_models(config)
    make_planner(config)
    return config.run_dir


def check_models(config: Config) -> None:
    """Raises ConfigError if the codec can be planned for but not run, or if the teacher's weights are not named."""
    from tim import codecs

    try:
        codecs.make(config.codec.kind)
    except ValueError as error:
        raise ConfigError(f"codec.kind: {error}") from error
    if config.objective.alignment is not None and config.objective.alignment.path is None:
        raise ConfigError("objective.alignment.path: missing; give it in the file, or as objective.alignment.path=PATH on the command line")


def _check_classes(corpus: Corpus, *, classes: int) -> None:
    """One shard in memory at a time."""
    without, largest = 0, -1
    for shard in range(len(corpus.shards)):
        labels = corpus.read(shard, columns=("label",)).column("label")
        without += labels.null_count
        largest = max(largest, pc.call_function("max", [labels]).as_py() or 0)
    if without:
        raise ConfigError(
            f"corpus {corpus.name}: {without} of {corpus.count} samples have no class, which condition: class needs: "
            "prepare it from sources with a column `label`, or with KEY.cls members"
        )
    if largest >= classes:
        raise ConfigError(f"corpus {corpus.name}: has class {largest}, but network.params.num_classes {classes} means 0 to {classes - 1}")
