"""Create the planner of a run from its configuration. Shared by `tim plan` and `tim train`, so both use the same plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from launch.arguments import one_config, split_overrides
from launch.config.data_sections import CorpusConfig
from launch.config.load import load_config
from launch.config.schema import Config, ConfigError
from launch.training.checks import check_features, check_models
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.tags import TagShuffle
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.planning.validation_plan import ValidationPlan
from pipeline.storage.remote import is_remote
from pipeline.streams.corpus_view import CorpusView
from pipeline.streams.size_only_corpus import read_sizes


def make_planner(config: Config) -> Planner:
    """Open the corpora and create the planner.

    Raises:
        ValueError: no corpus is given, a corpus is invalid or lacks the required classes, or the plan is impossible.
    """
    if not config.corpus:
        raise ConfigError("corpus: missing; give it in the file, or as corpus=PATH on the command line")
    share = None if config.validation is None else config.validation.share
    return Planner(
        _open_corpora(config, config.corpus, validation_share=share),
        plan=config.plan,
        seed=config.seed,
        width=config.network.params.hidden_size,
        diffusion_share=config.objective.diffusion_share,
        consistency_share=config.objective.consistency_share,
        caption_dropout=config.condition_dropout,
        caption_weights=config.text.caption_weights,
        shuffle_tags=TagShuffle(**tags.model_dump()) if (tags := config.text.shuffle_tags) else None,
    )


def make_validation_plan(config: Config, planner: Planner, *, step: int = 0, ranks: int = 1) -> ValidationPlan:
    """The held-out images of the planner's corpora, or those of `validation.corpus`, at the sizes that step `step` trains.

    Raises ValueError if there are none, if a corpus is invalid or has other features than the planner's, or if the planner selects images
    of `validation.corpus` as well.
    """
    section = config.validation
    assert section is not None
    sources = [source.held_out() for source in planner.sources]
    if section.corpus:
        sources = _open_corpora(config, section.corpus)
        corpora = planner.corpora[0], *(source.corpus for source in sources)
        needed, *others = (set(corpus.features.parts) if corpus.features else set() for corpus in corpora)
        if any(other != needed for other in others):
            kind = f"features with {', '.join(sorted(needed))}" if needed else "no features"
            raise ConfigError(f"validation.corpus: needs {kind}, as the corpus that is trained on")
    plan, width = planner.plan.at(step), config.network.params.hidden_size
    validation = ValidationPlan(sources, plan=plan, width=width, images=section.images, ranks=ranks)
    if section.corpus:
        _check_not_trained(validation, planner)
    return validation


def typed_config(arguments: Sequence[str], *, checkpoint: Path | None = None) -> Config:
    """Load the config of arguments `CONFIG [KEY=VALUE …]`. Without CONFIG, use that of the checkpoint's run. Raises ValueError."""
    if checkpoint is not None and not split_overrides(arguments)[0]:
        arguments = [str(_step_folder(checkpoint).parents[1] / "config.yaml"), *arguments]
    source, overrides = one_config(arguments)
    return load_config(source, overrides=overrides)


def plan_from_config(arguments: Sequence[str]) -> Planner:
    """Planner for command-line arguments `CONFIG [KEY=VALUE …]`, at its first step."""
    return make_planner(typed_config(arguments))


def plan_from_checkpoint(path: Path, *, arguments: Sequence[str], replan: bool = False) -> Planner:
    """Planner at the position of a checkpoint, or of a run's newest checkpoint. Uses the run's config unless `arguments` name one.

    With `replan`, return the plan that `tim train --replan` would start there.

    Raises ValueError if `path` is not a checkpoint, or its plan differs.
    """
    from launch.checkpoints import history
    from launch.checkpoints.resuming import restore_plan

    try:
        folder = _step_folder(path)
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        state["data"]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: neither a checkpoint nor a run with one; give RUN/checkpoints/step-000500, or RUN") from error
    config = typed_config(arguments, checkpoint=path)
    planner = make_planner(config)
    recorded = history.read(folder.resolve().parents[1])
    restore_plan(planner, state, planner=planner, recorded=recorded, config=config, folder=folder, replan=replan)
    return planner


def plan_from_sizes(file: Path, *, stride: int = 32, width: int = 1152, **plan: Any) -> Planner:
    """Plan over a list of image sizes, each with the cost of an image with r = t. `plan` are keys of the plan section."""
    settings = PlanConfig(stride=stride, cost_factors=(1, 1, 1), **plan)
    return Planner([read_sizes(file)], plan=settings, seed=0, width=width, diffusion_share=1, consistency_share=0)


def check_ready(config: Config) -> Path:
    """Validate once before training processes are started. Returns the run_dir.

    Raises:
        ValueError: run_dir, corpus or teacher weights are missing, a corpus is invalid, the codec is not available, the plan is
            impossible, or there is nothing to validate on.
    """
    run_dir = required_run_dir(config)
    check_models(config)
    planner = make_planner(config)
    if config.validation is not None:
        make_validation_plan(config, planner)
    return run_dir


def required_run_dir(config: Config) -> Path:
    """The run_dir. Raises ConfigError if none is given."""
    if config.run_dir is None:
        raise ConfigError("run_dir: missing; give it in the file, or as run_dir=PATH on the command line")
    return config.run_dir


def _open_corpora(config: Config, entries: Sequence[CorpusConfig], *, validation_share: float | None = None) -> list[CorpusView]:
    """Open and check corpora. Raises ValueError if one is invalid or lacks the required classes or features."""
    check_shards = config.loader.on_bad_shard == "error"
    sources = [
        CorpusView(
            Corpus.open(entry.path, name=entry.name, features=entry.features, check_shards=check_shards),
            weight=entry.weight,
            repeats=entry.repeats,
            cap=entry.cap,
            where=entry.where,
            exclude=entry.exclude,
            loss_weight=entry.loss_weight,
            validation_share=validation_share,
        )
        for entry in entries
    ]
    corpora = [source.corpus for source in sources]
    _check_cache(config, corpora)
    for corpus in corpora:
        if corpus.features is not None:
            check_features(corpus.features, config)
    if config.network.params.num_classes is not None:
        for corpus in corpora:
            _check_classes(corpus, classes=config.network.params.num_classes)
    return sources


def _check_not_trained(validation: ValidationPlan, planner: Planner) -> None:
    """Raise ConfigError if a corpus of the planner selects images of the validation."""
    places = {shard.path: (corpus.digest, number) for corpus in validation.corpora for number, shard in enumerate(corpus.shards)}
    keys: dict[tuple[str, int], list[str]] = {}
    for sample in (sample for pack in validation.packs for sample in pack.samples):
        keys.setdefault(places[sample.tar], []).append(sample.key)
    for source in planner.sources:
        for number in range(len(source.corpus.shards)):
            if held_out := keys.get((source.corpus.digest, number)):
                table, targets = source.select(number, rule=validation.plan.size_rule, columns=("key",))
                trained = set(table.column("key").filter(pa.array(targets.left_out == 0)).to_pylist())
                if count := len(trained.intersection(held_out)):
                    remedy = "select others with `where` or `exclude`, or give validation.share"
                    raise ConfigError(f"validation.corpus: {count} of its images are trained on, as part of corpus {source.name}: {remedy}")


def _step_folder(path: Path) -> Path:
    """Checkpoint folder for a path; for a run, its newest checkpoint."""
    latest = path / "latest"
    return path / "checkpoints" / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path


def _check_cache(config: Config, corpora: Sequence[Corpus]) -> None:
    remote = [shard for corpus in corpora for shard in corpus.shards if is_remote(shard.path)]
    largest = max(remote, key=lambda shard: shard.bytes, default=None)
    cache = config.loader.cache
    if cache is not None and largest is not None and largest.bytes > cache.bytes:
        raise ConfigError(f"loader.cache.bytes: {cache.bytes} is less than the {largest.bytes} bytes of {largest.path}")


def _check_classes(corpus: Corpus, *, classes: int) -> None:
    """Check the class labels of a corpus, with one shard in memory at a time."""
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
        raise ConfigError(f"corpus {corpus.name}: has class {largest}, but network.params.num_classes {classes} allows 0 to {classes - 1}")
