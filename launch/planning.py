"""A run's planner, as its config describes it: what `tim plan` shows is what `tim train` does."""

from __future__ import annotations

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
