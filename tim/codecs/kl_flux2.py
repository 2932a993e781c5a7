"""FLUX.2's autoencoder: diffusers' AutoencoderKLFlux2, a KL autoencoder whose latents are normalised by a batch norm's statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from tim.codecs.kl import KL


class Flux2(KL):
    """diffusers' AutoencoderKLFlux2, as Flux2Pipeline uses it.

    The means of the distribution are the latents. Each 2 × 2 cells become one, with four times the channels, and each channel is
    normalised by the running mean and variance of the network's `bn`.
    """

    is_stochastic = False

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → the network's latents (B, C, h, w)."""
        return super().encode_values(values)[0], None

    def encode_tiled(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (3, H, W) → the network's latents (1, C, h, w)."""
        return super().encode_tiled(image)[0], None

    def normalise(self, mean: Tensor, deviation: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network's latents (B, C, h, w) → normalised ones (B, 4·C, h/2, w/2)."""
        average, spread = self._statistics()
        patches = torch.nn.functional.pixel_unshuffle(mean, self.network.config.patch_size[0])
        return (patches - average) / spread, None

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        average, spread = self._statistics()
        return torch.nn.functional.pixel_shuffle(latents * spread + average, self.network.config.patch_size[0])

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (1, 4·C, 1, 1) of the channels of latents."""
        bn = self.network.bn
        return bn.running_mean.view(1, -1, 1, 1), (bn.running_var.view(1, -1, 1, 1) + self.network.config.batch_norm_eps).sqrt()
