"""Autoencoders with a distribution of latents per image: diffusers' AutoencoderKL (Stable Diffusion, SDXL, SD3, FLUX.1)."""

from __future__ import annotations

from torch import Tensor

from tim.codecs.autoencoder import Autoencoder
from tim.codecs.base import Direction, Tiling


class KL(Autoencoder):
    """diffusers' AutoencoderKL. `encode` gives the mean and deviation of each latent."""

    is_stochastic = True

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → means and deviations (B, C, h, w)."""
        distribution = self.network.encode(values).latent_dist
        return distribution.mean, distribution.std

    def plan_tiling(self, height: int, width: int, direction: Direction) -> Tiling:
        """The whole image."""
        config = self.network.config
        channels = tuple(config.block_out_channels)
        if direction == "decode":
            channels = tuple(getattr(config, "decoder_block_out_channels", None) or channels)
            channels = (*channels[1:], channels[-1])  # the first block of a stage reads the channels of the deeper one
        return Tiling(1, WORK * height * width * max(count / 4**depth for depth, count in enumerate(channels)))


WORK = 4 * 6  # bytes per pixel and channel of the largest map
