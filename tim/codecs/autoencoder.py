"""The part that codecs of diffusers autoencoders share: batches, scaling of latents, conversion of pixels, the memory limit."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim.codecs.base import Direction, Geometry, Latents, Tiling, by_shape, to_levels, to_values

BATCH_PIXELS = 1024 * 1024  # per autoencoder batch; at least one image
GB = 1e9


class Autoencoder(ABC):
    """A frozen diffusers autoencoder in float32. Latents are (z − shift) · scale, with the factors from its config.

    Images of the same size are batched. Everything stays on `device`. An image that needs more than `memory_gb` is processed in tiles, with
    the same result; None: half of the device's memory. Subclasses say how the network is called.
    """

    is_stochastic = False

    def __init__(self, network: Any, geometry: Geometry, *, device: torch.device | str = "cpu", memory_gb: float | None = None) -> None:
        self.factor, self.channels = geometry
        self.network = network.eval().requires_grad_(False)
        self._memory_gb = memory_gb
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        """Move the weights to a device. Without a limit of memory, that of the new device counts."""
        self.device = torch.device(device)
        self.network.to(self.device)
        self.memory = total_memory(self.device) / 2 if self._memory_gb is None else self._memory_gb * GB

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image, sides multiples of `factor` → float32 (C, H/factor, W/factor)."""
        means: dict[int, Tensor] = {}
        deviations: dict[int, Tensor] = {}
        for batch, is_whole in self._batches(images, pixels_per_cell=1, direction="encode"):
            pixels = [images[i].to(self.device) for i in batch]
            found = self.encode_values(torch.stack([to_values(image) for image in pixels])) if is_whole else self.encode_tiled(pixels[0])
            mean, deviation = self.normalise(*found)
            means.update(zip(batch, mean, strict=True))
            if deviation is not None:
                deviations.update(zip(batch, deviation, strict=True))
        count = range(len(images))
        return Latents([means[i] for i in count], [deviations[i] for i in count] if self.is_stochastic else None)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor), clipped and rounded to the nearest level."""
        images: dict[int, Tensor] = {}
        for batch, is_whole in self._batches(latents, pixels_per_cell=self.factor, direction="decode"):
            cells = self.denormalise(torch.stack([latents[i].to(self.device).float() for i in batch]))
            levels = to_levels(self.network.decode(cells).sample) if is_whole else self.decode_tiled(cells)
            images.update(zip(batch, levels, strict=True))
        return [images[i] for i in range(len(latents))]

    def tiling(self, height: int, width: int, direction: Direction = "decode") -> Tiling:
        """How an image of this size in pixels is encoded or decoded. Raises ValueError if the memory limit is too low for it."""
        found = self.plan_tiling(height, width, direction)
        if found.bytes > self.memory and self._memory_gb is not None:
            allowed, least = (f"{value / GB:.3g} GB" for value in (self.memory, found.bytes))
            does = "encoding" if direction == "encode" else "decoding"
            raise ValueError(f"codec.memory_gb: {does} {width}x{height} pixels takes at least {least}, the limit is {allowed}: raise it")
        return found

    @abstractmethod
    def plan_tiling(self, height: int, width: int, direction: Direction) -> Tiling:
        """The tiling with the fewest tiles within `memory`, or with the least memory if none is."""

    @abstractmethod
    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → the network's latents (B, C, h, w), and their deviations if the codec is stochastic."""

    @abstractmethod
    def encode_tiled(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (3, H, W) → as `encode_values`, in tiles."""

    @abstractmethod
    def decode_tiled(self, cells: Tensor) -> Tensor:
        """The network's latents (1, C, h, w) → uint8 (1, 3, H, W), in tiles."""

    def normalise(self, mean: Tensor, deviation: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network's latents and deviations (B, C, h, w) → those that the transition network sees."""
        scale, shift = self._scaling
        return (mean - shift) * scale, None if deviation is None else deviation * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`, without deviations."""
        scale, shift = self._scaling
        return latents / scale + shift

    @property
    def _scaling(self) -> tuple[float, float]:
        config = self.network.config
        return float(getattr(config, "scaling_factor", None) or 1.0), float(getattr(config, "shift_factor", None) or 0.0)

    def _batches(self, items: Sequence[Tensor], *, pixels_per_cell: int, direction: Direction) -> Iterator[tuple[list[int], bool]]:
        """Batches of positions of items with the same shape, and whether they are processed whole."""
        for (height, width), positions in by_shape(items).items():
            height, width = height * pixels_per_cell, width * pixels_per_cell
            tiling = self.tiling(height, width, direction)
            most = min(BATCH_PIXELS / (height * width), self.memory / tiling.bytes) if tiling.splits == 1 else 1
            count = max(1, int(most))
            yield from ((positions[start : start + count], tiling.splits == 1) for start in range(0, len(positions), count))


def total_memory(device: torch.device) -> float:
    """Memory of a device in bytes; on the CPU that of the machine or the container. Infinite if it is unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    total = float("inf")
    if "SC_PHYS_PAGES" in os.sysconf_names:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, float(text)) if text.isdigit() else total
