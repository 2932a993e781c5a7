"""The deep compression autoencoder: diffusers' AutoencoderDC (arXiv 2410.10733)."""

from __future__ import annotations

from torch import Tensor

from tim.codecs import dc_ae_layers
from tim.codecs.layered import Layered
from tim.codecs.tiles import GlobalLayer, Layer


class DCAE(Layered):
    """diffusers' AutoencoderDC."""

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → the network's latents (B, C, h, w)."""
        return self.network.encode(values).latent, None

    def encoder_layers(self) -> list[Layer | GlobalLayer]:
        """Layers from values (1, 3, H, W) to the network's latents."""
        return dc_ae_layers.encoder_layers(self.network.encoder)

    def decoder_layers(self) -> list[Layer | GlobalLayer]:
        """Layers from the network's latents to values."""
        return dc_ae_layers.decoder_layers(self.network.decoder)
