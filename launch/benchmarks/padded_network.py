"""Padded version of the network for `tim bench`: images are stacked into one dense tensor, with padding and masks.

It computes the same function as `TransitionTransformer`, with the same weights; only the layout differs.

Legend: B images, N tokens of the longest image, D network width, H heads, M tokens of the longest caption, F features of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tim import PackedText, PackedTokens, Segments, TransitionTransformer
from tim.layers import Block, CrossAttention, SelfAttention, at_least_float32, plain_norm
from tim.packed import Condition
from tim.rope import rotate, rotations


class Padding(NamedTuple):
    """Conversion between a pack and its dense form. positions: (T,) positions of the pack's tokens in (B·N); mask: (B, 1, 1, N), False
    at padding, or None if all lengths are equal."""

    images: int
    length: int
    positions: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> Padding:
        length, count = segments.max_len, len(segments.lengths)
        real = torch.arange(length) < torch.tensor(segments.lengths)[:, None]
        mask = None if real.all() else real[:, None, None].to(device)
        return cls(count, length, real.flatten().nonzero()[:, 0].to(device), mask)

    def spread(self, packed: Tensor) -> Tensor:
        """(T, …) → (B, N, …), zeros at padding."""
        shape = (self.images, self.length, *packed.shape[1:])
        if self.mask is None:
            return packed.view(shape)
        return packed.new_zeros(self.images * self.length, *packed.shape[1:]).index_copy(0, self.positions, packed).view(shape)

    def gather(self, dense: Tensor) -> Tensor:
        """(B, N, …) → (T, …)."""
        flat = dense.flatten(0, 1)
        return flat if self.mask is None else flat.index_select(0, self.positions)


class DenseNetwork:
    """Wraps a network: takes and returns packs, but computes on dense batches."""

    def __init__(self, network: TransitionTransformer) -> None:
        self.network = network
        self.patch_size = network.patch_size

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition) -> PackedTokens:
        assert isinstance(condition, PackedText)
        network, device = self.network, packed.tokens.device
        images, captions = Padding.of(packed.segments, device), Padding.of(condition.segments, device)
        angles = images.spread(rotations(packed, head_dim=network.head_dim, layout=network.rope))
        delta_BD = network._interval(t, r)
        time_BD = network.t_embedder(t) + delta_BD
        text_BMD = plain_norm(network.y_embedder(captions.spread(condition.features)))
        x_BND = network.x_embedder(images.spread(packed.tokens))
        for block in network.blocks:
            assert isinstance(block, Block)
            x_BND = _block(block, x_BND, time_BD, delta_BD, text_BMD, angles, images.mask, captions.mask)
        shift, scale = network.final_layer.adaLN_modulation(time_BD)[:, None].chunk(2, dim=-1)
        out = network.final_layer.linear(_modulate(plain_norm(x_BND), shift, scale))
        return packed._replace(tokens=images.gather(at_least_float32(out)))


def _block(
    block: Block, x: Tensor, time: Tensor, delta: Tensor, text: Tensor, angles: Tensor, mask: Tensor | None, text_mask: Tensor | None
) -> Tensor:
    modulation = block.adaLN_modulation(time)[:, None].chunk(9, dim=-1)
    shift_self, scale_self, gate_self, shift_cross, scale_cross, gate_cross, shift_mlp, scale_mlp, gate_mlp = modulation
    x = torch.addcmul(x, gate_self, _self_attention(block.attn, _modulate(plain_norm(x), shift_self, scale_self), delta, angles, mask))
    assert block.cross_attn is not None
    h = _cross_attention(block.cross_attn, _modulate(plain_norm(x), shift_cross, scale_cross), text, angles, text_mask)
    x = torch.addcmul(x, gate_cross, h)
    return torch.addcmul(x, gate_mlp, block.mlp(_modulate(plain_norm(x), shift_mlp, scale_mlp)))


def _modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return torch.addcmul(shift_B1D, x_BND, 1 + scale_B1D)


def _self_attention(layer: SelfAttention, x: Tensor, delta: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
    qkv = layer.qkv(x)
    if layer.qkv_d is not None:
        qkv = qkv + layer.qkv_d(delta)[:, None]
    q, k, v = qkv.unflatten(-1, (3, layer.heads, -1)).unbind(2)
    q, k = rotate(layer.q_norm(q), angles).to(v.dtype), rotate(layer.k_norm(k), angles).to(v.dtype)
    return layer.proj(dense_attention(q, k, v, mask))


def _cross_attention(layer: CrossAttention, x: Tensor, text: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
    q = layer.q(x).unflatten(-1, (layer.heads, -1))
    k, v = layer.kv(text).unflatten(-1, (2, layer.heads, -1)).unbind(2)
    q, k = rotate(layer.q_norm(q), angles).to(v.dtype), layer.k_norm(k).to(v.dtype)
    return layer.proj(dense_attention(q, k, v, mask))


def dense_attention(q_BNHD: Tensor, k_BMHD: Tensor, v_BMHD: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, H·D); mask: (B, 1, 1, M), False at missing keys."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
