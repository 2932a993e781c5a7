"""The part that codecs of diffusers autoencoders share: batches, scaling of latents, conversion of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tim.codecs.base import Geometry, Latents, same_shape, to_levels, to_values

BATCH_PIXELS = 1024 * 1024  # per autoencoder batch, about 5 GB of activations; at least one image
TILE = 2048  # pixels; an image with a longer side is processed in overlapping tiles, as in the published training


class Autoencoder:
    """A frozen diffusers autoencoder in float32. Latents are (z − shift) · scale, with the factors from its config.

    Images of the same size are batched. Everything stays on `device`. Subclasses say how the network is called.
    """

    is_stochastic = False

    def __init__(self, network: Any, geometry: Geometry, *, device: torch.device | str = "cpu") -> None:
        self.factor, self.channels = geometry
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.scale = float(getattr(network.config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(network.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image, sides multiples of `factor` → float32 (C, H/factor, W/factor)."""
        means: dict[int, Tensor] = {}
        deviations: dict[int, Tensor] = {}
        for batch in same_shape(images, max_cells=BATCH_PIXELS):
            pixels = torch.stack([to_values(images[i].to(self.device)) for i in batch])
            self.set_tiling(pixels.shape[-2:], tile=TILE)
            mean, deviation = self.encode_values(pixels)
            means.update(zip(batch, (mean - self.shift) * self.scale, strict=True))
            if deviation is not None:
                deviations.update(zip(batch, deviation * self.scale, strict=True))
        count = range(len(images))
        return Latents([means[i] for i in count], [deviations[i] for i in count] if self.is_stochastic else None)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        images: dict[int, Tensor] = {}
        for batch in same_shape(latents, max_cells=BATCH_PIXELS // self.factor**2):
            cells = torch.stack([latents[i].to(self.device).float() for i in batch]) / self.scale + self.shift
            self.set_tiling([side * self.factor for side in cells.shape[-2:]], tile=TILE)
            images.update((i, to_levels(image)) for i, image in zip(batch, self.network.decode(cells).sample, strict=True))
        return [images[i] for i in range(len(latents))]

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → unscaled latents (B, C, h, w), and their deviations if the codec is stochastic."""
        raise NotImplementedError

    def set_tiling(self, size: Sequence[int], *, tile: int) -> None:
        """Let diffusers process an image of this size in tiles if a side is longer than a tile."""
