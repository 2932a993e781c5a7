"""The interface of extractors, and what they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from tim.disk_cache import DiskCache
from tim.pretrained import safetensors_files


class Extractor(Protocol):
    """Images of any size to features.

    kind: inception, clip, dinov2, pixels, or the model type of another network; name: for tables; digest: sha256 of weights and
    preprocessing, the key of caches; width: features of an image; preprocessing: how an image becomes the network's input.
    """

    @property
    def kind(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def preprocessing(self) -> str: ...

    def __call__(self, images: Sequence[Image.Image], /) -> Tensor:
        """(B, F) float32 on the CPU."""
        ...


class ClipExtractor(Extractor, Protocol):
    """An extractor whose network embeds texts, too."""

    def texts(self, texts: Sequence[str], /) -> Tensor:
        """(B, F) float32 on the CPU. Texts are cut at the network's length."""
        ...


def file_digest(file: Path) -> str:
    """sha256 of a file in hexadecimal; that of a large file is remembered."""
    cache = DiskCache.default()
    return safetensors_files.file_digest(file) if cache is None else cache.file_digest(file)


def digest_of(*parts: str) -> str:
    """sha256 in hexadecimal of all that features depend on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def in_batches(images: Sequence[Image.Image], encode: Callable[[Sequence[Image.Image]], Tensor], *, batch: int, width: int) -> Tensor:
    """Features (B, F) float32 on the CPU, encoded `batch` images at a time. No images give (0, F)."""
    parts = [encode(images[start : start + batch]).float().cpu() for start in range(0, len(images), batch)]
    return torch.cat(parts) if parts else torch.zeros(0, width)
