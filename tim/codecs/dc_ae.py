"""The deep compression autoencoder: diffusers' AutoencoderDC (arXiv 2410.10733)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tim.codecs.autoencoder import Autoencoder


class DCAE(Autoencoder):
    """diffusers' AutoencoderDC."""

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → latents (B, C, h, w)."""
        return self.network.encode(values).latent, None

    def set_tiling(self, size: Sequence[int], *, tile: int) -> None:
        """Let diffusers process an image of this size in tiles if a side is longer than a tile."""
        network = self.network
        network.tile_sample_min_height = network.tile_sample_min_width = tile
        network.tile_sample_stride_height = network.tile_sample_stride_width = tile * 3 // 4
        network.tile_latent_min_height = network.tile_latent_min_width = tile // self.factor
        network.use_tiling = max(size) > tile
