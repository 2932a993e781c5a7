"""Attention over packs by scaled-dot-product attention: segments of similar lengths are batched, the shorter ones masked.

Legend: T query tokens, S key tokens, B segments of a batch, H heads, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tim.packed import Segments

# One more kernel launch costs about as much as this many query-key pairs, so segments are batched while masking wastes less.
PAIRS_PER_LAUNCH = 2048


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative (`torch.func.jvp`) is being taken."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def sdpa(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    """Attention of a pack, (T, H, D); see `tim.attention.attention`."""
    plan = _batching(q_segments.lengths, kv_segments.lengths, q.device)
    heads, width = q.shape[1:]
    if not plan.batches:
        return torch.zeros_like(q)
    kernel = _written_out if has_tangent(q, k, v) else F.scaled_dot_product_attention
    qs = _Gather.apply(q, plan.q_index, plan.q_inverse).split([b.segments * b.q_len for b in plan.batches])
    ks = _Gather.apply(k, plan.kv_index, plan.kv_inverse).split([b.segments * b.kv_len for b in plan.batches])
    vs = _Gather.apply(v, plan.kv_index, plan.kv_inverse).split([b.segments * b.kv_len for b in plan.batches])
    outputs = []
    for batch, q_part, k_part, v_part in zip(plan.batches, qs, ks, vs, strict=True):
        q_BHTD = q_part.view(batch.segments, batch.q_len, heads, width).transpose(1, 2)
        k_BHSD = k_part.view(batch.segments, batch.kv_len, heads, width).transpose(1, 2)
        v_BHSD = v_part.view(batch.segments, batch.kv_len, heads, width).transpose(1, 2)
        out_BHTD = kernel(q_BHTD, k_BHSD, v_BHSD, attn_mask=batch.mask)
        outputs.append(out_BHTD.transpose(1, 2).reshape(-1, heads, width))
    outputs.append(q.new_zeros(1, heads, width))
    return torch.cat(outputs).index_select(0, plan.q_inverse)


def _written_out(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, attn_mask: Tensor | None) -> Tensor:
    """Scaled-dot-product attention as plain products and a softmax: the fused kernels have no forward-mode derivative."""
    scores = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BHSD.mT
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v_BHSD


class _Batch(NamedTuple):
    segments: int
    q_len: int
    kv_len: int
    mask: Tensor | None  # (segments, 1, 1, kv_len), False where a shorter segment has no key


class _Batching(NamedTuple):
    """How a pack falls into batches: `index` gathers tokens into them, `inverse` finds a token there (one row past the end: nowhere)."""

    batches: tuple[_Batch, ...]
    q_index: Tensor
    q_inverse: Tensor
    kv_index: Tensor
    kv_inverse: Tensor


class _Gather(torch.autograd.Function):
    """Rows by index, where rows that occur twice are padding without gradient: so the backward pass is a gather too, not a scatter."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, index, inverse = inputs
        ctx.save_for_backward(inverse)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])]).index_select(0, inverse), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        return tangent.index_select(0, index)


@lru_cache(maxsize=256)
def _batching(q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], device: torch.device) -> _Batching:
    """Sort segments by length and batch neighbours while masking costs less than another kernel launch."""
    assert len(q_lengths) == len(kv_lengths), "one key segment for every query segment"
    groups: list[list[int]] = []
    segments = [i for i in range(len(q_lengths)) if q_lengths[i] and kv_lengths[i]]
    for i in sorted(segments, key=lambda i: (-q_lengths[i], -kv_lengths[i], i)):
        if groups:
            q_len, kv_len = q_lengths[groups[-1][0]], max(kv_lengths[j] for j in groups[-1])
            grown = max(kv_len, kv_lengths[i])
            waste = q_len * grown - q_lengths[i] * kv_lengths[i] + (grown - kv_len) * q_len * len(groups[-1])
            if waste <= PAIRS_PER_LAUNCH:
                groups[-1].append(i)
                continue
        groups.append([i])

    q_starts, kv_starts = np.cumsum((0, *q_lengths)), np.cumsum((0, *kv_lengths))
    batches = []
    q_index, kv_index = [], []
    for group in groups:
        q_len, kv_len = q_lengths[group[0]], max(kv_lengths[j] for j in group)
        counts = np.array([kv_lengths[j] for j in group])
        mask = None
        if (counts < kv_len).any():
            mask = torch.from_numpy((np.arange(kv_len) < counts[:, None])[:, None, None]).to(device)
        batches.append(_Batch(len(group), q_len, kv_len, mask))
        q_index += [_padded_range(q_starts[j], q_lengths[j], q_len) for j in group]
        kv_index += [_padded_range(kv_starts[j], kv_lengths[j], kv_len) for j in group]
    q_gather, q_inverse = _with_inverse(q_index, int(q_starts[-1]))
    kv_gather, kv_inverse = _with_inverse(kv_index, int(kv_starts[-1]))
    return _Batching(tuple(batches), q_gather.to(device), q_inverse.to(device), kv_gather.to(device), kv_inverse.to(device))


def _padded_range(start: int, length: int, padded: int) -> np.ndarray:
    rows = np.full(padded, -1, dtype=np.int64)
    rows[:length] = np.arange(start, start + length)
    return rows


def _with_inverse(parts: list[np.ndarray], total: int) -> tuple[Tensor, Tensor]:
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    inverse = np.full(total, len(index), dtype=np.int64)
    real = np.flatnonzero(index >= 0)
    inverse[index[real]] = real
    return torch.from_numpy(np.maximum(index, 0)), torch.from_numpy(inverse)
