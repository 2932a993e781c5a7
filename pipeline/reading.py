"""What a worker process does: planned samples → pixels, captions, time draws and noise. A pure function of the plan.

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
from pipeline.draws import generator, to_uniform
from pipeline.fields import parse_json, read_fields
from pipeline.images import load_image
from pipeline.steps import Member, PlannedSample
from pipeline.storage import ShardReader


class Failure(NamedTuple):
    """A sample that could not be read: its position in the pack, and why."""

    position: int
    reason: str


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
    """Reads packs. Belongs to one process from its first read on.

    Args:
        seed: of times and noise.
        stride: pixels per token side.
        channels: of a latent.
        factor: pixels per latent cell.
    """

    def __init__(self, *, seed: int, stride: int, channels: int, factor: int) -> None:
        self._seed = seed
        self._stride = stride
        self._channels = channels
        self._factor = factor
        self._shards = ShardReader()

    def read(self, samples: Sequence[PlannedSample]) -> ReadPack:
        """Everything of a pack; what cannot be read is among its `failures`. An empty pack becomes one dummy image of one stride."""
        if not samples:
            return self._dummy_pack()
        pixels: list[NDArray[np.uint8]] = []
        captions: list[str] = []
        failures: list[Failure] = []
        for position, sample in enumerate(samples):
            try:
                image, caption = self._image(sample), self._caption(sample)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # a shard cut off, a broken image or caption file
                failures.append(Failure(position=position, reason=in_words(error)))
                image, caption = self._black(), ""
            pixels.append(image)
            captions.append(caption)
        sizes = [(image.shape[1], image.shape[2]) for image in pixels]
        return ReadPack(
            pixels=torch.from_numpy(np.concatenate([image.reshape(-1) for image in pixels])),
            noise=torch.from_numpy(np.concatenate([self._noise(s, size=size) for s, size in zip(samples, sizes, strict=True)])),
            sizes=sizes,
            captions=captions,
            uniforms=np.stack([time_draws(self._seed, sample) for sample in samples]),
            failures=failures,
        )

    def _image(self, sample: PlannedSample) -> NDArray[np.uint8]:
        data = self._shards.read(sample.tar, offset=sample.image.offset, length=sample.image.length)
        pixels = load_image(data, resize=sample.resize, crop=(sample.height, sample.width), flip=sample.flip)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _caption(self, sample: PlannedSample) -> str:
        """The drawn caption: the text file is the first one, the json file has the others; "" if dropped or if there is none."""
        if sample.caption < 0:
            return ""
        text = self._member(sample, sample.text).decode("utf-8-sig", "replace")
        if sample.caption == 0 and text and not text.isspace():
            return normalise(text)[0]
        record = parse_json(self._member(sample, sample.json)) or {}
        captions, _ = clean_captions([text, *read_fields(record).captions])
        return captions[sample.caption] if captions else ""

    def _member(self, sample: PlannedSample, member: Member) -> bytes:
        if not member.exists:
            return b""
        return self._shards.read(sample.tar, offset=member.offset, length=min(member.length, MAX_TEXT_BYTES))

    def _noise(self, sample: PlannedSample, *, size: tuple[int, int]) -> NDArray[np.float32]:
        return noise(self._seed, sample, shape=(self._channels, size[0] // self._factor, size[1] // self._factor)).reshape(-1)

    def _black(self) -> NDArray[np.uint8]:
        return np.zeros((3, self._stride, self._stride), dtype=np.uint8)

    def _dummy_pack(self) -> ReadPack:
        return ReadPack(
            pixels=torch.from_numpy(self._black().reshape(-1)),
            noise=torch.zeros(self._channels * (self._stride // self._factor) ** 2),
            sizes=[(self._stride, self._stride)],
            captions=[""],
            uniforms=np.full((1, 2), 0.5),
            failures=[],
        )


def noise(seed: int, sample: PlannedSample, *, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The noise that a sample is mixed with on this visit."""
    return generator(seed, "noise", sample.visit, sample.id).standard_normal(shape, dtype=np.float32)


def time_draws(seed: int, sample: PlannedSample) -> NDArray[np.float64]:
    """The two numbers in (0, 1) that the times of a sample follow from on this visit."""
    return to_uniform(generator(seed, "times", sample.visit, sample.id).integers(0, 2**64, 2, dtype=np.uint64))


def in_words(error: Exception) -> str:
    """Why a sample could not be read, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
