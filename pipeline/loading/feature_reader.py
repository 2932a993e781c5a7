"""Read cached features: latents instead of images, text features instead of captions, and a teacher's tokens.

A pure function of the plan with the same draws as `pipeline.loading.pack_reader`: images and features give the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import one_line
from pipeline.features.tensors import latent_name, text_name, tokens_name, unpack
from pipeline.planned_steps import PlannedSample
from pipeline.randomness import generator


class SampleFeatures(NamedTuple):
    """Latent (C, h, w), caption features (M, F) and teacher tokens (N, D) of a sample, float32; None for parts that are not read."""

    latent: Tensor | None
    text: Tensor | None
    teacher: Tensor | None


class FeatureDecoder:
    """Decode the bytes of a sample's features.

    Args:
        seed: of a stochastic codec's draws.
        stride: pixels per token side; channels: latent channels; factor: pixels per latent cell.
        latents: whether to read latents.
        empty: file with the empty caption's features; None if captions are not read from features.
        teacher: width of the teacher's tokens; None if they are not read.
    """

    def __init__(
        self, *, seed: int, stride: int, channels: int, factor: int, latents: bool, empty: str | None, teacher: int | None
    ) -> None:
        self._seed = seed
        self._stride = stride
        self._channels = channels
        self._factor = factor
        self._latents = latents
        self._empty = None if empty is None else empty_text(empty)
        self._teacher = teacher

    def blank(self) -> SampleFeatures:
        """Features of one token, for an unreadable sample or an empty pack."""
        cells = self._stride // self._factor
        latent = torch.zeros(self._channels, cells, cells) if self._latents else None
        return SampleFeatures(latent, self._empty, None if self._teacher is None else torch.zeros(1, self._teacher))

    def decode(self, sample: PlannedSample, data: memoryview | OSError) -> SampleFeatures:
        """Decode a sample. Raises `data` if it is an error, KeyError, ValueError, and safetensors' errors."""
        if isinstance(data, OSError):
            raise data
        if not len(data):
            raise ValueError("it could not be encoded, see the reason in its row of the features table")
        tensors = unpack(data)
        crop = (*sample.resize, sample.height, sample.width)
        latent = self._latent(tensors, sample, crop) if self._latents else None
        tokens = None if self._teacher is None else tensors[tokens_name(crop, flipped=sample.flip)].float()
        count = sample.height * sample.width // self._stride**2
        if tokens is not None and tokens.shape != (count, self._teacher):
            raise ValueError(f"its teacher tokens have shape {tuple(tokens.shape)}, not {(count, self._teacher)}")
        return SampleFeatures(latent, None if self._empty is None else self._text(tensors, sample), tokens)

    def _latent(self, tensors: Mapping[str, Tensor], sample: PlannedSample, crop: tuple[int, int, int, int]) -> Tensor:
        latent = tensors[latent_name(crop, flipped=sample.flip)].float()
        expected = (self._channels, sample.height // self._factor, sample.width // self._factor)
        if latent.shape != expected:
            raise ValueError(f"its latent has shape {tuple(latent.shape)}, not {expected}")
        deviation = tensors.get(latent_name(crop, flipped=sample.flip, deviation=True))
        if deviation is not None:
            noise = generator(self._seed, "codec", sample.visit, sample.id).standard_normal(expected, dtype=np.float32)
            latent = latent + deviation.float() * torch.from_numpy(noise)
        return latent

    def _text(self, tensors: Mapping[str, Tensor], sample: PlannedSample) -> Tensor:
        if sample.caption < 0 or (sample.caption == 0 and text_name(0) not in tensors):
            assert self._empty is not None
            return self._empty
        return tensors[text_name(sample.caption)].float()


def empty_text(path: str | Path) -> Tensor:
    """Features of the empty caption: float32 (M, F). Raises ValueError if the file does not have them."""
    try:
        return load_file(path)[text_name(0)].float()
    except Exception as error:  # safetensors' own, a missing file or tensor
        raise ValueError(f"{path} has no features of the empty caption ({one_line(error)}): encode the corpus again") from error
