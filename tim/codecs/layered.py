"""Autoencoders that are lists of local and global layers: processed in tiles with the same result as on the whole image."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tim.codecs import tiles
from tim.codecs.autoencoder import Autoencoder
from tim.codecs.base import Direction, Span, Tiling, to_levels, to_values
from tim.codecs.tiles import GlobalLayer, Layer


class Layered(Autoencoder):
    """An autoencoder whose layers a subclass lists."""

    network: Any

    @abstractmethod
    def encoder_layers(self) -> list[Layer | GlobalLayer]:
        """Layers from values (1, 3, H, W) to the network's latents."""

    @abstractmethod
    def decoder_layers(self) -> list[Layer | GlobalLayer]:
        """Layers from the network's latents to values."""

    def plan_tiling(self, height: int, width: int, direction: Direction) -> Tiling:
        """The tiling with the fewest tiles within `memory`, or with the least memory if none is."""
        plan = self._plan(height, width, direction)
        return Tiling(max(segment.splits for segment in plan.segments), plan.bytes)

    def encode_tiled(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (3, H, W) → the network's latents (1, C, h, w). Only the part under a tile is converted to float."""
        plan = self._plan(image.shape[-2], image.shape[-1], "encode")
        last = plan.segments[-1]
        latent = image.new_empty((1, last.layers[-1].channels, last.heights[-1], last.widths[-1]), dtype=self.network.dtype)

        def read(rows: Span, columns: Span) -> Tensor:
            return to_values(image[None, :, rows.start : rows.stop, columns.start : columns.stop])

        def write(rows: Span, columns: Span, tile: Tensor) -> None:
            latent[..., rows.start : rows.stop, columns.start : columns.stop] = tile

        tiles.run(plan, read, write)
        return latent, None

    def decode_tiled(self, cells: Tensor) -> Tensor:
        """The network's latents (1, C, h, w) → uint8 (1, 3, H, W). Each tile is converted to levels as it comes."""
        height, width = (side * self.factor for side in cells.shape[-2:])
        plan = self._plan(height, width, "decode")
        image = cells.new_empty((1, plan.segments[-1].layers[-1].channels, height, width), dtype=torch.uint8)

        def write(rows: Span, columns: Span, tile: Tensor) -> None:
            image[..., rows.start : rows.stop, columns.start : columns.stop] = to_levels(tile)

        tiles.run(plan, lambda rows, columns: cells[..., rows.start : rows.stop, columns.start : columns.stop], write)
        return image

    def _plan(self, height: int, width: int, direction: Direction) -> tiles.Plan:
        if direction == "encode":
            return tiles.plan(self._encoder_layers, height, width, memory=self.memory)
        return tiles.plan(self._decoder_layers, height // self.factor, width // self.factor, memory=self.memory)

    @cached_property
    def _encoder_layers(self) -> list[Layer | GlobalLayer]:
        return self.encoder_layers()

    @cached_property
    def _decoder_layers(self) -> list[Layer | GlobalLayer]:
        return self.decoder_layers()
