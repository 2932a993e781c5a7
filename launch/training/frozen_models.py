"""Frozen models of a run and their outputs for a pack: latents, condition, tokens of the alignment teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.loading.loader import Batch
from tim.alignment import AlignmentTeacher
from tim.codecs import Codec
from tim.packed import Condition, PackedText
from tim.text.encoders import TextEncoder


@dataclass(frozen=True, slots=True)
class FrozenModels:
    """Codec, text encoder and alignment teacher. Each is None if it is unused or all corpora provide its features.

    empty_text: features (M, F) of the empty caption if captions are cached; null_class: the network's class for "no class";
    stride: pixels per side of a token.
    """

    codec: Codec | None
    encoder: TextEncoder | None
    teacher: AlignmentTeacher | None
    empty_text: Tensor | None
    null_class: int | None
    reads_text: bool
    stride: int
    device: torch.device

    def latents(self, batch: Batch) -> list[Tensor]:
        """Latents (C, h, w) of a pack's images."""
        if batch.latents is not None:
            return batch.latents
        assert self.codec is not None
        means, deviations = self.codec.encode(batch.images)
        if deviations is None:
            return means
        assert batch.codec_noise is not None
        return [mean + spread * noise for mean, spread, noise in zip(means, deviations, batch.codec_noise, strict=True)]

    def condition(self, batch: Batch) -> Condition:
        return self._condition(batch.captions, batch.labels, batch.texts)

    def no_condition(self, images: int) -> Condition:
        """Unconditional input for a number of images."""
        empty = None if self.empty_text is None else [self.empty_text] * images
        return self._condition([""] * images, torch.full((images,), -1), empty)

    def teacher_tokens(self, batch: Batch) -> Tensor | None:
        """Teacher tokens (T, z_dim) of a pack; None without alignment."""
        if self.teacher is None:
            return batch.teacher
        return self.teacher.tokens(batch.images, [(image.shape[1] // self.stride, image.shape[2] // self.stride) for image in batch.images])

    def _condition(self, captions: Sequence[str], classes: Tensor, texts: Sequence[Tensor] | None) -> Condition:
        """texts: cached features of the captions, if any. Class −1 means no class."""
        if self.encoder is not None:
            return PackedText.from_features(self.encoder.encode(captions))
        if texts is not None and self.reads_text:
            return PackedText.from_features([text.to(self.device, non_blocking=True) for text in texts])
        null_class = 0 if self.null_class is None else self.null_class  # without a null class, only dummy images have no class
        return classes.where(classes >= 0, null_class).to(self.device, non_blocking=True)
