"""The interface of codecs, and conversions between pixels and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

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


Direction: TypeAlias = Literal["encode", "decode"]


class Span(NamedTuple):
    """Rows or columns of a map from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of rows or columns."""
        return self.stop - self.start

    def within(self, outer: Span) -> slice:
        """This span as a slice of a tensor that holds `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)


class Tiling(NamedTuple):
    """How an image is processed.

    splits: tiles along the longer side of the largest maps, 1: the whole image at once. bytes: predicted peak memory of activations, beside
    the weights, the image in uint8 and its latent.
    """

    splits: int
    bytes: float


class Codec(Protocol):
    """Images to latents and back. `is_stochastic`: whether latents have deviations.

    The latent and the pixels of an image depend on this image alone, not on the others in the call.
    """

    factor: int
    channels: int
    is_stochastic: bool

    def encode(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image → float32 (C, H/factor, W/factor)."""
        ...

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        ...

    def to(self, device: torch.device | str) -> None:
        """Move the weights to a device."""
        ...

    def tiling(self, height: int, width: int, direction: Direction = "decode") -> Tiling:
        """How an image of this size in pixels is encoded or decoded. Raises ValueError if the codec's memory limit is too low for it."""
        ...


def to_values(image: Tensor) -> Tensor:
    """Levels, uint8 → float32 values in [−1, 1]."""
    return image.float() / 127.5 - 1


def to_levels(values: Tensor) -> Tensor:
    """Values → uint8 levels: clipped to [−1, 1] and rounded to the nearest level."""
    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def by_shape(items: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Positions of items by height and width."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for position, item in enumerate(items):
        shapes.setdefault((item.shape[-2], item.shape[-1]), []).append(position)
    return shapes
