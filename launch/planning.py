"""A run's planner, as its config describes it: what `tim plan` shows is what `tim train` does."""

from __future__ import annotations

from pathlib import Path

from launch.config import Config, ConfigError
from pipeline.index import Corpus
from pipeline.planner import Planner


def make_planner(config: Config) -> Planner:
    """Open the corpora and plan over them.

    Raises:
        ValueError: no corpus is given, one is none, or the plan is impossible.
    """
    if not config.corpus:
        raise ConfigError("corpus: missing; give it in the file, or as corpus=PATH on the command line")
    return Planner(
        [Corpus.open(source.path, name=source.name) for source in config.corpus],
        plan=config.plan,
        seed=config.seed,
        width=config.network.params.hidden_size,
        diffusion_share=config.objective.diffusion_share,
        consistency_share=config.objective.consistency_share,
        caption_dropout=config.text.caption_dropout,
    )


def check_ready(config: Config) -> Path:
    """Refuse once, before any training process is started, what each of them would refuse. Returns the run_dir.

    Raises:
        ValueError: no run_dir or no corpus is given, a corpus is none, or the plan is impossible.
    """
    if config.run_dir is None:
        raise ConfigError("run_dir: missing; give it in the file, or as run_dir=PATH on the command line")
    make_planner(config)
    return config.run_dir
