"""What a worker process does where features take the place of pictures: planned samples → latents, text features, time draws and noise.

A pure function of the plan, like `pipeline.reading`, with the same draws: the same steps can be trained from either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from safetensors.torch import load, load_file
from torch import Tensor

from pipeline.draws import generator
from pipeline.features import latent_name, text_name
from pipeline.reading import Failure, ReadPack, in_words, noises, time_draws
from pipeline.steps import PlannedSample
from pipeline.storage import BadShard, Part, ShardReader

FetchedFeatures = tuple[Sequence[PlannedSample], list[memoryview | OSError]]  # each sample's bytes, or why they cannot be read


class FeatureReader:
    """Reads packs of features. Belongs to one process from its first read on; one thread may fetch while another decodes.

    Args:
        seed: of times and noise, and of what a codec samples.
        stride: pixels per token side.
        channels: of a latent.
        factor: pixels per latent cell.
        shards: where bytes come from.
        empty: file of the empty caption's features; None where there are no captions.
    """

    def __init__(self, *, seed: int, stride: int, channels: int, factor: int, shards: ShardReader, empty: str | None) -> None:
        self._seed = seed
        self._channels = channels
        self._factor = factor
        self._no_latent = torch.zeros(channels, stride // factor, stride // factor)
        self._empty = None if empty is None else empty_text(empty)
        self._shards = shards

    def fetch(self, samples: Sequence[PlannedSample]) -> FetchedFeatures:
        """The bytes of a pack, from all its shards at once."""
        return samples, self._shards.read_parts([Part(sample.tar, sample.image.offset, sample.image.length) for sample in samples])

    def decode(self, fetched: FetchedFeatures) -> ReadPack:
        """Everything of a pack; what cannot be read is among its `failures`. An empty pack becomes one dummy latent of one stride."""
        samples, parts = fetched
        latents: list[Tensor] = []
        texts: list[Tensor | None] = []
        failures: list[Failure] = []
        for position, (sample, data) in enumerate(zip(samples, parts, strict=True)):
            try:
                latent, text = self._features(sample, data)
            except Exception as error:  # a shard cut off, or whatever safetensors makes of one that is damaged
                failures.append(Failure(position=position, reason=in_words(error), bad_shard=isinstance(error, BadShard)))
                latent, text = self._no_latent, self._empty
            latents.append(latent)
            texts.append(text)
        uniforms = time_draws(self._seed, samples) if samples else np.full((1, 2), 0.5)
        shapes = [(latent.shape[0], latent.shape[1], latent.shape[2]) for latent in latents]
        noise = [torch.from_numpy(each) for each in noises(self._seed, samples, shapes=shapes)] if samples else [self._no_latent]
        latents, texts = latents or [self._no_latent], texts or [self._empty]
        known = [text for text in texts if text is not None]
        return ReadPack(
            pixels=torch.cat([latent.reshape(-1) for latent in latents]),
            noise=torch.cat([each.reshape(-1) for each in noise]),
            sizes=[(latent.shape[1] * self._factor, latent.shape[2] * self._factor) for latent in latents],
            captions=[""] * len(latents),
            uniforms=uniforms,
            failures=failures,
            texts=torch.cat(known) if known else None,
            text_lengths=tuple(len(text) for text in known),
        )

    def _features(self, sample: PlannedSample, data: memoryview | OSError) -> tuple[Tensor, Tensor | None]:
        if isinstance(data, OSError):
            raise data
        tensors = load(bytes(data))
        height, width = sample.height, sample.width
        latent = tensors[latent_name(height, width, flipped=sample.flip)].float()
        expected = (self._channels, height // self._factor, width // self._factor)
        if latent.shape != expected:
            raise ValueError(f"its latent is of shape {tuple(latent.shape)}, not {expected}")
        deviation = tensors.get(latent_name(height, width, flipped=sample.flip, deviation=True))
        if deviation is not None:
            drawn = generator(self._seed, "codec", sample.visit, sample.id).standard_normal(expected, dtype=np.float32)
            latent = latent + deviation.float() * torch.from_numpy(drawn)
        return latent, None if self._empty is None else self._text(tensors, sample)

    def _text(self, tensors: Mapping[str, Tensor], sample: PlannedSample) -> Tensor:
        if sample.caption < 0 or (sample.caption == 0 and text_name(0) not in tensors):
            assert self._empty is not None
            return self._empty
        return tensors[text_name(sample.caption)].float()


def empty_text(path: str) -> Tensor:
    """Features of the empty caption: float32 (M, F). Raises ValueError if the file is none of them."""
    try:
        return load_file(path)[text_name(0)].float()
    except Exception as error:  # safetensors' own, a missing file or tensor
        raise ValueError(f"{path} has no features of the empty caption ({in_words(error)}): encode the corpus again") from error
