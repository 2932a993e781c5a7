"""The layers of diffusers' AutoencoderDC, for tiling: each with its halo and the memory that it needs.

Residual blocks, up- and downsampling are 3 × 3 convolutions. The linear attention of EfficientViT blocks depends on all cells through
Σ v·relu(k)ᵀ alone; its multi-scale projections are small depthwise convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tim.codecs.tiles import GlobalLayer, Layer


class LinearAttention:
    """diffusers' SanaMultiscaleLinearAttention as a global layer."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.halo = max((scale.proj_in.kernel_size[0] // 2 for scale in module.to_qkv_multiscale), default=0)
        self.channels = module.to_out.out_features
        inner = module.to_q.out_features
        scales = 1 + len(module.to_qkv_multiscale)
        self.work = 2.0 * self.channels + inner * (6 + 8 * scales)

    def features(self, x: Tensor) -> Tensor:
        """Map (1, C, h, w) → query, key and value of all scales (1, F, h, w)."""
        module = self._module
        cells = x.movedim(1, -1)
        features = torch.cat([module.to_q(cells), module.to_k(cells), module.to_v(cells)], dim=3).movedim(-1, 1)
        if not module.to_qkv_multiscale:
            return features
        return torch.cat([features, *(scale(features) for scale in module.to_qkv_multiscale)], dim=1)

    def sums(self, features: Tensor) -> Tensor:
        """Σ v·relu(k)ᵀ over the cells, and Σ relu(k) as a last row: (1, heads, D + 1, D)."""
        _, key, value = self._parts(features)
        key = self._module.nonlinearity(key).transpose(-1, -2)
        return torch.cat([value @ key, key.sum(dim=-2, keepdim=True)], dim=-2)

    def apply(self, x: Tensor, sums: Tensor | None = None) -> Tensor:
        """Output of the attention, with its residual connection. sums: None: those of x."""
        module = self._module
        features = self.features(x)
        sums = self.sums(features) if sums is None else sums
        weighted = sums @ module.nonlinearity(self._parts(features)[0])
        attended = weighted[:, :, :-1] / (weighted[:, :, -1:] + module.eps)
        output = module.to_out(attended.reshape(1, -1, *x.shape[-2:]).movedim(1, -1))
        output = module.norm_out(output).movedim(-1, 1) if module.norm_type == "rms_norm" else module.norm_out(output.movedim(-1, 1))
        return output + x if module.residual_connection else output

    def _parts(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (1, heads, D, cells)."""
        query, key, value = features.reshape(1, -1, 3 * self._module.attention_head_dim, features.shape[-2] * features.shape[-1]).chunk(
            3, dim=2
        )
        return query, key, value


def encoder_layers(encoder: Any) -> list[Layer | GlobalLayer]:
    """The layers of diffusers' DC-AE encoder, from pixels to unscaled latents."""
    layers = [_resampling(encoder.conv_in)]
    layers += [layer for stage in encoder.down_blocks for block in stage for layer in _block(block)]

    def project(x: Tensor) -> Tensor:
        output = encoder.conv_out(x)
        return output + x.unflatten(1, (-1, encoder.out_shortcut_average_group_size)).mean(dim=2) if encoder.out_shortcut else output

    channels_in, channels = encoder.conv_out.in_channels, encoder.conv_out.out_channels
    return [*layers, Layer(project, 1, channels, 2 * channels_in + 3 * channels)]


def decoder_layers(decoder: Any) -> list[Layer | GlobalLayer]:
    """The layers of diffusers' DC-AE decoder, from unscaled latents to pixels."""

    def read(x: Tensor) -> Tensor:
        output = decoder.conv_in(x)
        return output + x.repeat_interleave(decoder.in_shortcut_repeats, dim=1) if decoder.in_shortcut else output

    def normalise(x: Tensor) -> Tensor:
        return decoder.conv_act(decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1))

    channels = decoder.conv_in.out_channels
    layers: list[Layer | GlobalLayer] = [Layer(read, 1, channels, 2 * decoder.conv_in.in_channels + 4 * channels)]
    layers += [layer for stage in reversed(decoder.up_blocks) for block in stage for layer in _block(block)]
    last = decoder.norm_out.dim[0]
    return [*layers, Layer(normalise, 0, last, 4 * last), _resampling(decoder.conv_out)]


def _block(block: Any) -> list[Layer | GlobalLayer]:
    """The layers of one block of a stage. Raises ValueError for a block of an unknown class."""
    name = type(block).__name__
    if name == "ResBlock":
        channels = block.conv2.out_channels
        return [Layer(block, 2, channels, 6 * channels)]
    if name == "EfficientViTBlock":
        attention = LinearAttention(block.attn)
        hidden = block.conv_out.conv_inverted.out_channels
        return [attention, Layer(block.conv_out, 1, attention.channels, 2 * attention.channels + 4 * hidden)]
    if name in ("DCUpBlock2d", "DCDownBlock2d"):
        return [_resampling(block)]
    raise ValueError(f"an autoencoder with {name} cannot be processed in tiles: leave codec.memory_gb out")


def _resampling(module: Any) -> Layer:
    """A convolution, alone or with up- or downsampling."""
    name = type(module).__name__
    conv = module if name == "Conv2d" else module.conv
    channels_in = conv.in_channels
    if name == "DCUpBlock2d":
        channels = conv.out_channels if module.interpolate else conv.out_channels // 4
        return Layer(module, 1, channels, 2 * channels_in + (8 * channels_in if module.interpolate else 0) + 16 * channels, up=2)
    if name == "DCDownBlock2d":
        channels = conv.out_channels * (4 if module.downsample else 1)
        return Layer(module, 1, channels, 3 * channels_in + channels, down=2)
    return Layer(module, conv.kernel_size[0] // 2, conv.out_channels, 2 * channels_in + 2 * conv.out_channels)
