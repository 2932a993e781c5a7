"""The interface of codecs, and conversions between pixels and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """factor: pixels per side of a latent cell; channels: latent channels. All that planning and counting need from a codec."""

    factor: int
    channels: int


class Latents(NamedTuple):
    """One latent (C, h, w) per image. For a stochastic codec, `means` and `deviations` are those of each latent's distribution."""

    means: list[Tensor]
    deviations: list[Tensor] | None


class Codec(Protocol):
    """Images to latents and back. `is_stochastic`: whether latents have deviations."""

    factor: int
    channels: int
    is_stochastic: bool

    def encode(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image → float32 (C, H/factor, W/factor)."""
        ...

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        ...


def to_values(image: Tensor) -> Tensor:
    """Levels, uint8 → float32 values in [−1, 1]."""
    return image.float() / 127.5 - 1


def to_levels(values: Tensor) -> Tensor:
    """Values → uint8 levels: clipped to [−1, 1] and rounded to the nearest level."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def same_shape(items: Sequence[Tensor], *, max_cells: int) -> Iterator[list[int]]:
    """Batches of positions of items with the same shape: at most `max_cells` cells each, or one item."""
    shapes: dict[torch.Size, list[int]] = {}
    for position, item in enumerate(items):
        shapes.setdefault(item.shape, []).append(position)
    for shape, positions in shapes.items():
        count = max(1, max_cells // (shape[-2] * shape[-1]))
        yield from (positions[start : start + count] for start in range(0, len(positions), count))
