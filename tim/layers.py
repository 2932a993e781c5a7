"""The transition network's layers, with the parameter names of the published checkpoints.

Legend: B images, T image tokens of a pack, S text tokens, D network width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tim.attention.dispatch import attention
from tim.model_kinds import Dtype
from tim.packed import PackedText, PackedTokens, per_token
from tim.rope import rotate


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    """Context in which matrix products run in this dtype. `fp32` also switches off an autocast around it."""
    return torch.autocast(device.type, torch.float16 if dtype == "fp16" else torch.bfloat16, enabled=dtype != "fp32")


def plain_norm(x: Tensor) -> Tensor:
    """Layer normalisation without learned scale and bias, in float32 (eps 1e-6)."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=1e-6)


class ModulatedNorm(nn.Module):
    """Plain norm, then x·(1 + scale) + shift with one shift and scale per image (adaLN, DiT, arXiv 2212.09748).

    `owner` is the pack's, (T,).
    """

    def forward(self, x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor, owner: Tensor) -> Tensor:
        return torch.addcmul(per_token(shift_BD, owner), plain_norm(x_TD), per_token(1 + scale_BD, owner))


class HeadNorm(nn.LayerNorm):
    """Affine layer normalisation of queries and keys over the head width, in float32 (eps 1e-5)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(at_least_float32(input), self.normalized_shape, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g x) ⊙ fc1_x x) (arXiv 2002.05202)."""

    def __init__(self, width: int, *, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


def mlp_width(width: int) -> int:
    """Hidden width of a block's SwiGLU: two thirds of the usual 4x, because it has a third matrix."""
    return int(4 * width * 2 / 3)


class PatchEmbedding(nn.Module):
    """Linear embedding of patches; the weight keeps the shape of the published convolution, (D, C, p, p)."""

    def __init__(self, channels: int, *, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(tokens, weight, self.proj.bias)


class TimeEmbedding(nn.Module):
    """Sinusoids of a time (128 cosines, then 128 sines; no scaling of the time), then an MLP. (B,) → (B, D)."""

    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        exponents = torch.arange(self.FREQUENCIES, device=t.device, dtype=t.dtype) / self.FREQUENCIES
        angles = t[:, None] * torch.exp(-math.log(10000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class CaptionEmbedding(nn.Module):
    """Caption features to the network's width: affine layer norm, then SwiGLU. (S, F) → (S, D)."""

    def __init__(self, features: int, *, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.mlp = SwiGLU(features, hidden=4 * width, out=width)

    def forward(self, text: Tensor) -> Tensor:
        return self.mlp(self.norm(text))


class ClassEmbedding(nn.Module):
    """One learned vector per class, plus one for the null class if `null`. (B,) int64 → (B, D)."""

    def __init__(self, classes: int, *, null: bool, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + null, width)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes)


class SelfAttention(nn.Module):
    """Attention among an image's tokens, with projections that depend on the transition length ("interval attention", TiM §4.2).

    qkv(x) + qkv_d(E_Δ), normalised per head, then rotated. `delta_BD` is the embedding of t − r. `attend` computes attention, `backends`
    maps a dtype to its backend; the default is `auto`.
    """

    backends: Mapping[torch.dtype, str] = {}
    attend: Callable[..., Tensor] = staticmethod(attention)

    def __init__(self, width: int, *, heads: int, qk_norm: bool, distance_aware: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv_d = nn.Linear(width, 3 * width, bias=False) if distance_aware else None
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, delta_BD: Tensor, packed: PackedTokens, rotations: Tensor) -> Tensor:
        qkv = self.qkv(x_TD)
        if self.qkv_d is not None:
            qkv = qkv + packed.per_token(self.qkv_d(delta_BD))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        q = rotate(self.q_norm(q), rotations).to(v.dtype)
        k = rotate(self.k_norm(k), rotations).to(v.dtype)
        out = self.attend(q, k, v, packed.segments, packed.segments, backend=self.backends.get(q.dtype, "auto"))
        return self.proj(out.flatten(1))


class CrossAttention(nn.Module):
    """Attention from an image's tokens to its caption's. Only the queries are rotated."""

    backends: Mapping[torch.dtype, str] = {}
    attend: Callable[..., Tensor] = staticmethod(attention)

    def __init__(self, width: int, *, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, text: PackedText, packed: PackedTokens, rotations: Tensor) -> Tensor:
        q = self.q(x_TD).unflatten(-1, (self.heads, -1))
        k, v = self.kv(text.features).unflatten(-1, (2, self.heads, -1)).unbind(1)
        q = rotate(self.q_norm(q), rotations).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        out = self.attend(q, k, v, packed.segments, text.segments, backend=self.backends.get(q.dtype, "auto"))
        return self.proj(out.flatten(1))


class Block(nn.Module):
    """Self-attention, cross-attention to the (normalised) caption and SwiGLU, each modulated and gated by the image's condition.

    Without `captions` there is no cross-attention and `text` is None.
    """

    def __init__(self, width: int, *, heads: int, modulation_rank: int, qk_norm: bool, distance_aware: bool, captions: bool) -> None:
        super().__init__()
        self.norm = ModulatedNorm()
        self.attn = SelfAttention(width, heads=heads, qk_norm=qk_norm, distance_aware=distance_aware)
        self.cross_attn = CrossAttention(width, heads=heads, qk_norm=qk_norm) if captions else None
        self.mlp = SwiGLU(width, hidden=mlp_width(width), out=width)
        self.adaLN_modulation = SwiGLU(width, hidden=modulation_rank, out=(9 if captions else 6) * width)

    def forward(
        self, x_TD: Tensor, condition_BD: Tensor, delta_BD: Tensor, text: PackedText | None, packed: PackedTokens, rotations: Tensor
    ) -> Tensor:
        modulation = self.adaLN_modulation(condition_BD).chunk(6 if self.cross_attn is None else 9, dim=-1)
        shift, scale, gate = modulation[:3]
        h = self.norm(x_TD, shift, scale, packed.owner)
        x_TD = torch.addcmul(x_TD, packed.per_token(gate), self.attn(h, delta_BD, packed, rotations))
        if self.cross_attn is not None:
            assert text is not None
            shift, scale, gate = modulation[3:6]
            h = self.norm(x_TD, shift, scale, packed.owner)
            x_TD = torch.addcmul(x_TD, packed.per_token(gate), self.cross_attn(h, text, packed, rotations))
        shift, scale, gate = modulation[-3:]
        h = self.norm(x_TD, shift, scale, packed.owner)
        return torch.addcmul(x_TD, packed.per_token(gate), self.mlp(h))


class FinalLayer(nn.Module):
    """Modulated projection of tokens to patches, (T, D) → (T, p·p·C)."""

    def __init__(self, width: int, *, out: int) -> None:
        super().__init__()
        self.norm = ModulatedNorm()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = SwiGLU(width, hidden=width // 2, out=2 * width)

    def forward(self, x_TD: Tensor, condition_BD: Tensor, packed: PackedTokens) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_BD).chunk(2, dim=-1)
        return self.linear(self.norm(x_TD, shift, scale, packed.owner))
