"""Draw the images of an evaluation, and measure them and the real ones. What is there already is not drawn again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from launch.console import Console
from launch.evaluation.options import LEAST_IMAGES, EvalOptions
from launch.evaluation.samples import Sample, choose_samples, common_rule, real_images, run_of, samples_digest, size_rule, sizes_line
from launch.evaluation.scorers import Scorers, make_scorers
from launch.evaluation.store import CHUNK, REAL, Measured, Setting, Store
from launch.sampling.model_source import ModelOptions, Say, open_generator, say_nothing
from launch.sampling.processes import of_all
from launch.sampling.recorded import ModelFacts
from pipeline.corpus.corpus import Corpus
from pipeline.progress import Progress, no_progress
from pipeline.size_rule import SizeRule
from pipeline.storage.shard_reader import ShardFacts, ShardReader
from tim import Generator
from tim.disk_cache import DiskCache, key
from tim.sampling.packs import share_of
from tim.sampling.requests import ImageRequest

if TYPE_CHECKING:
    from accelerate import PartialState

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Opened:
    """A model of an evaluation, and its limits of sizes: those of its run, if `is_of_run`, or the sampler's."""

    generator: Generator
    facts: ModelFacts
    rule: SizeRule
    is_of_run: bool


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation whose images are all measured. training: samples of the corpus, of which the first `store.count` were drawn."""

    store: Store
    facts: ModelFacts
    corpus: Corpus
    training: list[Sample]
    settings: list[Setting]
    scorers: Scorers

    @property
    def samples(self) -> list[Sample]:
        return self.training[: self.store.count]

    def real(self) -> Measured:
        """Features of the corpus's images, as many as `training`. Scores of those that were not drawn are NaN."""
        return self.store.read(REAL, count=len(self.training))

    def generated(self, setting: Setting) -> Measured:
        return self.store.read(setting.name, count=self.store.count)


def open_for_evaluation(model: ModelOptions, options: EvalOptions, *, state: PartialState | None, log: Say) -> Opened:
    """Open a model. Raises ValueError as `open_generator` and `size_rule`."""
    generator, digest = open_generator(model, state=state, log=log)
    run = run_of(model.path)
    rule = size_rule(run, stride=generator.stride, max_pixels=options.max_pixels)
    return Opened(generator, ModelFacts.of(generator, path=model.path, digest=digest, loras=model.loras), rule, run is not None)


def evaluate(
    models: Sequence[Opened],
    folders: Sequence[Path],
    options: EvalOptions,
    *,
    corpus: Corpus,
    state: PartialState | None,
    console: Console,
    locks: ExitStack,
) -> list[Evaluated]:
    """Draw the same samples with each of the models, into a folder each. Every process calls it with the same arguments and draws its
    share; the result is complete when it returns. locks: of the folders, until the result is written.

    Raises ValueError for a corpus that has too few samples or lacks captions, for metrics that cannot be computed, and for a folder with
    another evaluation; RuntimeError for a folder in use; OSError if a file cannot be written.
    """
    is_main = state is None or state.is_main_process
    log = console.line if is_main else say_nothing
    training = _choose(corpus, options, rule=common_rule([each.rule for each in models]), models=models)
    count = min(options.count, len(training))
    device = models[0].generator.device
    prompts = [sample.prompt for sample in training[:count]]
    log(sizes_line(training[:count]))
    if options.max_pixels is None and not any(each.is_of_run for each in models):
        log(f"warning: {models[0].facts.name} does not say at which sizes it was trained: images are as large as the real ones; limit them "
            "with --max-pixels")  # fmt: skip
    scorers = make_scorers(prompts, features=options.features, metrics=options.metrics, clip=options.clip, device=device)
    results = []
    for opened, folder in zip(models, folders, strict=True):
        store = Store(folder, count=count, save_images=options.save_images)
        settings = _settings(opened.generator, options, prompts=prompts)
        if is_main:
            locks.enter_context(store.claimed(_identity(opened, corpus, training, scorers, options)))
        of_all(0, state)  # no process writes before the folder is claimed
        log(f"{opened.facts.name}: {count} images in {', '.join(setting.name for setting in settings)}")
        results.append(Evaluated(store, opened.facts, corpus, training, settings, scorers))
        _measure_all(opened.generator, results[-1], state=state, console=console)
        of_all(0, state)
    return results


def _choose(corpus: Corpus, options: EvalOptions, *, rule: SizeRule, models: Sequence[Opened]) -> list[Sample]:
    """The samples to draw, and further ones of the corpus in which to look for copies. Raises ValueError."""
    classes = {opened.generator.network.classes is not None for opened in models}
    if len(classes) > 1:
        raise ValueError("--compare: one of the models draws captions, the other one classes")
    count = max(options.count, options.memorised)
    training = choose_samples(corpus, rule=rule, count=count, seed=options.seed, classes=classes.pop())
    if not corpus.count:
        raise ValueError(f"{options.corpus}: has no samples; give another corpus")
    if not training:
        raise ValueError(f"{options.corpus}: no sample has a size that the model draws; raise --max-pixels, or give another corpus")
    if len(training) < LEAST_IMAGES:
        raise ValueError(f"{options.corpus}: has {len(training)} samples that the model draws; an interval needs {LEAST_IMAGES}")
    if options.images is not None and len(training) < options.images:
        raise ValueError(f"--images {options.images}: {options.corpus} has {len(training)} samples that the model draws")
    return training


def _settings(generator: Generator, options: EvalOptions, *, prompts: Sequence[str | int]) -> list[Setting]:
    """The settings to draw. Raises ValueError for one that the model cannot draw."""
    guidances = options.guidances or [float(generator.spec.sampling["guidance"])]
    settings = [Setting(steps, guidance) for guidance in guidances for steps in options.steps]
    for steps, guidance in settings:
        generator.check(ImageRequest(prompts[0], width=1, height=1, steps=steps, guidance=guidance))
    generator.check_prompts(list(dict.fromkeys(prompts)))
    return settings


def _identity(opened: Opened, corpus: Corpus, training: Sequence[Sample], scorers: Scorers, options: EvalOptions) -> dict[str, Any]:
    """All that the stored numbers depend on, besides steps and guidance, which are in the names of files."""
    spec, facts = opened.generator.spec, opened.facts
    return {
        "model": {"digest": facts.digest, "loras": [asdict(lora) for lora in facts.loras]},
        "codec": spec.codec,
        "text encoder": spec.text,
        "precision": facts.dtype,
        "corpus": corpus.digest,
        "seed": options.seed,
        "number of images": min(options.count, len(training)),
        "choice of samples": samples_digest(training),
        "choice of features and metrics": scorers.identity,
    }


def _measure_all(generator: Generator, evaluated: Evaluated, *, state: PartialState | None, console: Console) -> None:
    """Measure this process's share of the chunks that are missing."""
    is_main = state is None or state.is_main_process
    with console.progress() if is_main else nullcontext(no_progress) as report:
        _measure_real(evaluated, state=state, report=report)
        chunks = _chunks(evaluated.samples)
        todo = [(setting, chunk) for setting in evaluated.settings for chunk in range(len(chunks))]
        mine = _share(todo, [(setting.steps, _pixels(chunks[chunk])) for setting, chunk in todo], state=state)
        missing = [(setting, chunk) for setting, chunk in mine if not evaluated.store.has(setting.name, chunk)]
        if is_main and len(missing) < len(mine):
            console.line(f"{len(mine) - len(missing)} of {len(mine)} parts of it are in {evaluated.store.folder} already")
        done, total = 0, sum(len(chunks[chunk]) for _, chunk in missing)
        for setting, chunk in missing:
            report("draw", done, total, note=setting.name)
            _draw_chunk(generator, evaluated, setting=setting, chunk=chunk)
            done += len(chunks[chunk])
            report("draw", done, total)


def _measure_real(evaluated: Evaluated, *, state: PartialState | None, report: Progress) -> None:
    store, chunks = evaluated.store, _chunks(evaluated.training)
    reader = ShardReader(facts={shard.path: ShardFacts(shard.bytes, shard.sha256) for shard in evaluated.corpus.shards})
    mine = _share(range(len(chunks)), [(1, _pixels(chunk)) for chunk in chunks], state=state)
    for done, chunk in enumerate(mine):
        report("real images", CHUNK * done, CHUNK * len(mine))
        if not store.has(REAL, chunk):
            store.write(REAL, chunk, _measure_real_chunk(evaluated, chunk, reader=reader))
    report("real images", CHUNK * len(mine), CHUNK * len(mine))
    reader.close()


def _measure_real_chunk(evaluated: Evaluated, chunk: int, *, reader: ShardReader) -> Measured:
    """Features of a chunk of the corpus's images, and scores of those whose samples are drawn."""
    samples, scorers = _chunks(evaluated.training)[chunk], evaluated.scorers
    scored = samples[: max(evaluated.store.count - chunk * CHUNK, 0)] if scorers.scores else []
    scores = {name: torch.full((len(samples),), math.nan, dtype=torch.float64) for name in scorers.scores}
    names = {each.name: f"reference-{key(evaluated.corpus.digest, each.digest, samples_digest(samples))}" for each in scorers.extractors}
    features = _cached(names)
    if features is not None and not scored:
        return Measured(features, scores)
    images = real_images(samples, reader=reader)
    if features is None:
        features = scorers.features(images)
        _cache(names, features)
    if scored:
        of_scored = {name: each[: len(scored)] for name, each in features.items()}
        for name, values in scorers.score(images[: len(scored)], [each.prompt for each in scored], features=of_scored).items():
            scores[name][: len(scored)] = values
    return Measured(features, scores)


def _cached(names: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Features of real images by extractor, if those of all are in the cache. names: of its files, by extractor."""
    cache = DiskCache.default()
    found = {name: None if cache is None else cache.read(file) for name, file in names.items()}
    features = {name: each["features"] for name, each in found.items() if each is not None}
    return features if len(features) == len(names) else None


def _cache(names: Mapping[str, str], features: Mapping[str, Tensor]) -> None:
    cache = DiskCache.default()
    if cache is not None:
        for name, file in names.items():
            cache.write(file, {"features": features[name]})


def _draw_chunk(generator: Generator, evaluated: Evaluated, *, setting: Setting, chunk: int) -> None:
    samples = _chunks(evaluated.samples)[chunk]
    drawn = {result.index: result.image.convert("RGB") for result in generator.draw([_request(each, setting) for each in samples])}
    images = [drawn[index] for index in range(len(samples))]
    features = evaluated.scorers.features(images)
    scores = evaluated.scorers.score(images, [each.prompt for each in samples], features=features)
    evaluated.store.write(setting.name, chunk, Measured(features, scores), images=images)


def _request(sample: Sample, setting: Setting) -> ImageRequest:
    return ImageRequest(
        sample.prompt, width=sample.width, height=sample.height, steps=setting.steps, guidance=setting.guidance, seed=sample.seed
    )


def _chunks(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[first : first + CHUNK] for first in range(0, len(samples), CHUNK)]


def _pixels(samples: Sequence[Sample]) -> int:
    return sum(sample.height * sample.width for sample in samples)


def _share(items: Sequence[Item], costs: Sequence[tuple[int, int]], *, state: PartialState | None) -> list[Item]:
    """The items of this process."""
    process, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    return [items[i] for i in share_of(costs, process=process, processes=processes)]
