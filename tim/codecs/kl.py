"""Autoencoders with a distribution of latents per image: diffusers' AutoencoderKL (Stable Diffusion, SDXL, SD3, FLUX.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tim.codecs.autoencoder import Autoencoder


class KL(Autoencoder):
    """diffusers' AutoencoderKL. `encode` gives the mean and deviation of each latent."""

    is_stochastic = True

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → means and deviations (B, C, h, w)."""
        distribution = self.network.encode(values).latent_dist
        return distribution.mean, distribution.std

    def set_tiling(self, size: Sequence[int], *, tile: int) -> None:
        """Let diffusers process an image of this size in tiles if a side is longer than a tile."""
        self.network.tile_sample_min_size, self.network.tile_latent_min_size = tile, tile // self.factor
        self.network.use_tiling = max(size) > tile
