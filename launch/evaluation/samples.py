"""The samples of an evaluation: chosen from a corpus by seed, with the sizes at which the model draws them, and their real images.

The choice depends on the corpus, the seed and the limits of sizes. The same samples are drawn with every model and setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.corpus.corpus import Corpus
from pipeline.digests import json_digest
from pipeline.images import Rejection, load_image
from pipeline.randomness import draw_key, hash_ids, uniforms
from pipeline.size_rule import SizeRule
from pipeline.storage.remote import is_remote
from pipeline.storage.shard_reader import ByteRange, ShardReader
from pipeline.streams.corpus_view import CorpusView
from tim.pretrained.hub import HUB
from tim.sampling.requests import MAX_PIXELS

CANDIDATES = 16  # shards are read until they have so many times the samples that are needed
_COLUMNS = ("key", "caption", "label", "image_offset", "image_length")
_PURPOSE = "evaluation"
_ABOVE = 3  # levels of folders between a run and a model of it


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of the corpus.

    prompt: its first caption, or its class, "" if it has none; resize, height, width: what the size rule makes of it, in pixels; seed: of
    the noise of the generated image; image: its bytes.
    """

    id: str
    prompt: str | int
    resize: tuple[int, int]
    height: int
    width: int
    tokens: int
    seed: int
    image: ByteRange


def run_of(model: str | Path) -> Path | None:
    """The run that a model is, or lies in, which says at which sizes it was trained. A config.yaml alone may be of something else.

    model: a path, or an address of the hub.
    """
    if str(model).startswith(HUB):
        return None
    path = Path(model)
    if (path / "config.yaml").is_file():
        return path
    above = path.resolve().parents[:_ABOVE]
    return next((folder for folder in above if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()), None)


def size_rule(run: Path | None, *, stride: int, max_pixels: int | None) -> SizeRule:
    """The sizes of a model: those of its run's plan at its end, or without a run any up to the sampler's limit.

    max_pixels: a further limit. Raises ValueError if the run's configuration is damaged.
    """
    rule = SizeRule(stride=stride, max_tokens=MAX_PIXELS // stride**2)
    if run is not None:
        from launch.config.load import load_config

        config = load_config(run / "config.yaml")
        plan = config.plan.at(config.train.steps)
        rule = plan.rule(stride=stride, max_tokens=plan.max_tokens)
    limits = [limit for limit in (rule.max_pixels, max_pixels) if limit is not None]
    return replace(rule, max_pixels=min(limits, default=None))


def common_rule(rules: Sequence[SizeRule]) -> SizeRule:
    """Sizes that several models draw: multiples of all strides, within all limits."""
    stride = math.lcm(*[rule.stride for rule in rules])
    largest = [min(rule.max_tokens * rule.stride**2, rule.max_pixels or MAX_PIXELS) for rule in rules]
    return SizeRule(
        stride=stride,
        max_tokens=max(1, min(largest) // stride**2),
        max_pixels=min(largest),
        min_tokens=max(-(-rule.min_tokens * rule.stride**2 // stride**2) for rule in rules),
        max_aspect=min(rule.max_aspect for rule in rules),
        fit=rules[0].fit,
    )


def choose_samples(corpus: Corpus, *, rule: SizeRule, count: int, seed: int, classes: bool) -> list[Sample]:
    """Up to `count` samples in an order by seed, the same for any larger `count` if it needs no further shards.

    All shards are equally likely. Of a large corpus, only as many are read as have `CANDIDATES` times the samples. Samples that the size
    rule or a takedown leaves out are not chosen, nor those without a prompt. classes: whether the model draws classes, not captions.

    Raises ValueError if a table cannot be read, or if no sample has a caption, or a class.
    """
    view = CorpusView(corpus)
    shards = hash_ids([f"{corpus.name}/{number}" for number in range(len(corpus.shards))])
    found: list[tuple[float, Sample]] = []
    for number in np.argsort(uniforms(seed, _PURPOSE, visits=0, ids=shards), kind="stable").tolist():
        found += _of_shard(view, number, rule=rule, seed=seed, classes=classes)
        if len(found) >= CANDIDATES * count:
            break
    ordered = [sample for _, sample in sorted(found, key=lambda each: (each[0], each[1].id))]
    samples = [sample for sample in ordered if sample.prompt != ""][:count]
    if ordered and not samples:
        what, model = ("class", "classes") if classes else ("caption", "captions")
        raise ValueError(f"{corpus.folder}: sample {ordered[0].id} has no {what}, but the model draws {model}: give a corpus with {model}")
    return samples


def _of_shard(view: CorpusView, number: int, *, rule: SizeRule, seed: int, classes: bool) -> list[tuple[float, Sample]]:
    """The samples of a shard, each with its place in the order."""
    table, targets = view.select(number, rule=rule, columns=_COLUMNS)
    rows = table.to_pylist()
    places = uniforms(seed, _PURPOSE, visits=0, ids=view.hashes([row["key"] for row in rows]))
    found = []
    for place, row, left_out, crop, tokens in zip(
        places.tolist(), rows, targets.left_out.tolist(), targets.crops.tolist(), targets.tokens.tolist(), strict=True
    ):
        if left_out:
            continue
        id, (resize_height, resize_width, height, width) = f"{view.name}/{row['key']}", crop
        data = ByteRange(view.corpus.shards[number].path, row["image_offset"], row["image_length"])
        prompt = row["label"] if classes else row["caption"]
        noise = draw_key(seed, f"{_PURPOSE} noise", 0, id)
        found.append(
            (place, Sample(id, "" if prompt is None else prompt, (resize_height, resize_width), height, width, tokens, noise, data))
        )
    return found


def sizes_line(samples: Sequence[Sample]) -> str:
    """The sizes of the images in words."""
    least, most = (choose(samples, key=lambda each: (each.height * each.width, each.width)) for choose in (min, max))
    megapixels = sum(each.height * each.width for each in samples) / 1e6
    between = "" if (least.height, least.width) == (most.height, most.width) else f" to {most.width}x{most.height}"
    return f"sizes: {least.width}x{least.height}{between}, in all {megapixels:,.1f} megapixels for each number of steps"


def samples_digest(samples: Sequence[Sample]) -> str:
    """sha256 of the choice, its sizes, prompts and seeds."""
    return json_digest([[each.id, each.prompt, each.resize, each.height, each.width, each.seed] for each in samples])


def real_images(samples: Sequence[Sample], *, reader: ShardReader) -> list[Image.Image]:
    """The images of the corpus at the samples' sizes, as training reads them. Raises ValueError if one cannot be read."""
    images = []
    for sample, data in zip(samples, reader.read_parts([each.image for each in samples]), strict=True):
        try:
            if isinstance(data, OSError):
                raise data
            pixels = load_image(data, resize=sample.resize, crop=(sample.height, sample.width))
        except (OSError, Rejection) as error:
            remedy = "is the storage alive?" if is_remote(sample.image.path) else "run `tim verify` on the corpus"
            raise ValueError(f"sample {sample.id} cannot be read ({error}): {remedy}") from error
        images.append(Image.fromarray(np.ascontiguousarray(pixels)))
    return images
