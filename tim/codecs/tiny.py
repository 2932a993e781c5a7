"""Small, fast approximations of other autoencoders: diffusers' AutoencoderTiny."""

from __future__ import annotations

from torch import Tensor

from tim.codecs.autoencoder import Autoencoder


class Tiny(Autoencoder):
    """diffusers' AutoencoderTiny. Its latents are already scaled like those of the autoencoder that it approximates."""

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → latents (B, C, h, w)."""
        return self.network.encode(values).latents, None
