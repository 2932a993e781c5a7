"""Small, fast approximations of other autoencoders: diffusers' AutoencoderTiny, all of convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tim.codecs.layered import Layered
from tim.codecs.tiles import GlobalLayer, Layer


class Tiny(Layered):
    """diffusers' AutoencoderTiny. Its latents are already scaled like those of the autoencoder that it approximates."""

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → the network's latents (B, C, h, w)."""
        return self.network.encode(values).latents, None

    def encoder_layers(self) -> list[Layer | GlobalLayer]:
        """Layers from values (1, 3, H, W) to the network's latents."""
        channels = self.network.config.in_channels
        return [Layer(lambda x: x.add(1).div(2), 0, channels, 3 * channels), *_layers(self.network.encoder.layers)]

    def decoder_layers(self) -> list[Layer | GlobalLayer]:
        """Layers from the network's latents to values."""
        first, last = self.network.config.latent_channels, self.network.config.out_channels
        clamp = Layer(lambda x: torch.tanh(x / 3) * 3, 0, first, 3 * first)
        return [clamp, *_layers(self.network.decoder.layers), Layer(lambda x: x.mul(2).sub(1), 0, last, 3 * last)]


def _layers(modules: Any) -> list[Layer]:
    """Layers of a sequence of modules. Raises ValueError for a module of an unknown class."""
    layers: list[Layer] = []
    channels = 0
    for module in modules:
        name = type(module).__name__
        if name == "Conv2d":
            channels_in, channels = module.in_channels, module.out_channels
            layers.append(Layer(module, 1, channels, 2 * channels_in + 2 * channels, down=module.stride[0]))
        elif name == "AutoencoderTinyBlock":
            layers.append(Layer(module, 3, channels, 6 * channels))
        elif name == "Upsample":
            layers.append(Layer(module, 0 if module.mode == "nearest" else 1, channels, 6 * channels, up=int(module.scale_factor)))
        elif not list(module.parameters()):
            layers.append(Layer(module, 0, channels, 2 * channels))
        else:
            raise ValueError(f"an autoencoder with {name} cannot be processed in tiles: leave codec.memory_gb out")
    return layers
