"""What a worker process does: planned samples → their bytes → pixels, captions, time draws and noise. A pure function of the plan.

Kept free of pyarrow, pydantic and the planner, because every worker process imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.captions import MAX_TEXT_BYTES, clean_captions, normalise
from pipeline.draws import generator, generators, to_uniform
from pipeline.fields import parse_json, read_fields
from pipeline.images import load_image
from pipeline.steps import Member, PlannedSample
from pipeline.storage import BadShard, Part, ShardReader
from pipeline.tags import TagShuffle


class Failure(NamedTuple):
    """A sample that could not be read: its position in the pack, why, and whether because its whole shard cannot."""

    position: int
    reason: str
    bad_shard: bool = False


class FetchedPack(NamedTuple):
    """The bytes of a pack: for every sample those of its image, its text and its json file, or why they cannot be read.

    What a sample does not have or need is empty.
    """

    samples: Sequence[PlannedSample]
    images: list[memoryview | OSError]
    texts: list[memoryview | OSError]
    records: list[memoryview | OSError]


class ReadPack(NamedTuple):
    """A pack as it travels between processes: few large tensors, because each costs a file descriptor.

    `pixels` is uint8, all images one after the other, (3, h, w) each; `noise` float32, (C, h/factor, w/factor) each; `sizes` are
    (h, w) in pixels; `uniforms` is (B, 2). A failed sample is a black image of one stride. Read from features, `pixels` are float32 latents
    like `noise`, zero for a failed one, and `texts` float32 (M, F) each, of `text_lengths` M, unless there are none.
    """

    pixels: Tensor
    noise: Tensor
    sizes: list[tuple[int, int]]
    captions: list[str]
    uniforms: NDArray[np.float64]
    failures: list[Failure]
    texts: Tensor | None = None
    text_lengths: tuple[int, ...] = ()


class PackReader:
    """Reads packs. Belongs to one process from its first read on; one thread may fetch a pack while another decodes one.

    Args:
        seed: of times, noise and tags.
        stride: pixels per token side.
        channels: of a latent.
        factor: pixels per latent cell.
        shards: where bytes come from.
        shuffle_tags: for captions that are lists of tags.
    """

    def __init__(
        self, *, seed: int, stride: int, channels: int, factor: int, shards: ShardReader, shuffle_tags: TagShuffle | None = None
    ) -> None:
        self._seed = seed
        self._stride = stride
        self._channels = channels
        self._factor = factor
        self._shards = shards
        self._shuffle_tags = shuffle_tags

    def fetch(self, samples: Sequence[PlannedSample]) -> FetchedPack:
        """The bytes of a pack, from all its shards at once."""
        images = [Part(sample.tar, sample.image.offset, sample.image.length) for sample in samples]
        texts = [_text_part(sample, sample.text) for sample in samples]
        records = [_text_part(sample, sample.json) for sample in samples]
        found, count = self._shards.read_parts([*images, *texts, *records]), len(samples)
        return FetchedPack(samples, found[:count], found[count : 2 * count], found[2 * count :])

    def decode(self, fetched: FetchedPack) -> ReadPack:
        """Everything of a pack; what cannot be read is among its `failures`. An empty pack becomes one dummy image of one stride."""
        samples = fetched.samples
        if not samples:
            return self._dummy_pack()
        pixels = np.empty(sum(3 * sample.height * sample.width for sample in samples), dtype=np.uint8)
        sizes: list[tuple[int, int]] = []
        captions: list[str] = []
        failures: list[Failure] = []
        filled = 0
        for position, (sample, data, text, record) in enumerate(zip(*fetched, strict=True)):
            try:
                image, caption = _decode_image(sample, data), self._caption(sample, text, record)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # a shard cut off, a broken image or caption file
                failures.append(Failure(position=position, reason=in_words(error), bad_shard=isinstance(error, BadShard)))
                image, caption = np.zeros((self._stride, self._stride, 3), dtype=np.uint8), ""
            height, width = image.shape[:2]
            pixels[filled : filled + image.size].reshape(3, height, width)[:] = image.transpose(2, 0, 1)
            filled += image.size
            sizes.append((height, width))
            captions.append(caption)
        return ReadPack(
            pixels=torch.from_numpy(pixels[:filled]),
            noise=torch.from_numpy(np.concatenate(self._noises(samples, sizes=sizes))),
            sizes=sizes,
            captions=captions,
            uniforms=time_draws(self._seed, samples),
            failures=failures,
        )

    def _caption(self, sample: PlannedSample, text: memoryview | OSError, record: memoryview | OSError) -> str:
        caption = decode_caption(sample, text, record)
        if self._shuffle_tags is None or not caption:
            return caption
        return self._shuffle_tags.apply(caption, generator=generator(self._seed, "tags", sample.visit, sample.id))

    def _noises(self, samples: Sequence[PlannedSample], *, sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
        shapes = [(self._channels, height // self._factor, width // self._factor) for height, width in sizes]
        return [noise.reshape(-1) for noise in noises(self._seed, samples, shapes=shapes)]

    def _dummy_pack(self) -> ReadPack:
        return ReadPack(
            pixels=torch.zeros(3 * self._stride**2, dtype=torch.uint8),
            noise=torch.zeros(self._channels * (self._stride // self._factor) ** 2),
            sizes=[(self._stride, self._stride)],
            captions=[""],
            uniforms=np.full((1, 2), 0.5),
            failures=[],
        )


def decode_caption(sample: PlannedSample, text: memoryview | OSError, record: memoryview | OSError) -> str:
    """The drawn caption: the text file is the first one, the json file has the others; "" if dropped or if there is none."""
    if sample.caption < 0:
        return ""
    first = str(_bytes(text), "utf-8-sig", "replace")
    if sample.caption == 0 and first and not first.isspace():
        return normalise(first)[0]
    captions, _ = clean_captions([first, *read_fields(parse_json(bytes(_bytes(record))) or {}).captions])
    return captions[sample.caption] if captions else ""


def noises(seed: int, samples: Sequence[PlannedSample], *, shapes: Sequence[tuple[int, int, int]]) -> list[NDArray[np.float32]]:
    """The noise that each sample is mixed with on this visit."""
    streams = generators(seed, "noise", [sample.visit for sample in samples], [sample.id for sample in samples])
    return [stream.standard_normal(shape, dtype=np.float32) for stream, shape in zip(streams, shapes, strict=True)]


def time_draws(seed: int, samples: Sequence[PlannedSample]) -> NDArray[np.float64]:
    """(B, 2): the two numbers in (0, 1) that the times of each sample follow from on this visit."""
    streams = generators(seed, "times", [sample.visit for sample in samples], [sample.id for sample in samples])
    return to_uniform(np.stack([stream.integers(0, 2**64, 2, dtype=np.uint64) for stream in streams]))


def in_words(error: Exception) -> str:
    """Why a sample could not be read, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _text_part(sample: PlannedSample, member: Member) -> Part:
    """Where a text stands, as far as anybody reads it; next to the image where there is none, or where the caption is dropped."""
    if sample.caption < 0 or not member.exists:
        return Part(sample.tar, sample.image.offset, 0)
    return Part(sample.tar, member.offset, min(member.length, MAX_TEXT_BYTES))


def _decode_image(sample: PlannedSample, data: memoryview | OSError) -> NDArray[np.uint8]:
    return load_image(_bytes(data), resize=sample.resize, crop=(sample.height, sample.width), flip=sample.flip)


def _bytes(found: memoryview | OSError) -> memoryview:
    if isinstance(found, OSError):
        raise found
    return found
