"""Attention over packs by scaled-dot-product attention: segments of similar lengths are batched, the shorter ones masked.

Legend: T query tokens, S key tokens, B segments of a batch, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tim.packed import Segments

# A kernel launch costs about as much as this many query-key pairs: segments are batched while masking wastes less.
PAIRS_PER_LAUNCH = 2048
# On a CPU, copying this many tokens into and out of a batch costs about as much as a launch; on a GPU almost nothing.
TOKENS_PER_LAUNCH = 128


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative (`torch.func.jvp`) is being taken."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def sdpa(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    """Attention of a pack, (T, H, D); see `tim.attention.dispatch.attention`."""
    plan = batching(q_segments.lengths, kv_segments.lengths, q.device)
    if not plan.batches:
        return torch.zeros_like(q)
    kernel = _unfused_attention if has_tangent(q, k, v) else F.scaled_dot_product_attention
    if plan.rows is not None:
        q = _Gather.apply(q, plan.rows.q_index, plan.rows.q_inverse)
        k, v = (_Gather.apply(x, plan.rows.kv_index, plan.rows.kv_inverse) for x in (k, v))
    parts = zip(plan.batches, plan.split_queries(q), plan.split_keys(k), plan.split_keys(v), strict=True)
    return plan.join_queries([kernel(q_BHTD, k_BHSD, v_BHSD, attn_mask=batch.mask) for batch, q_BHTD, k_BHSD, v_BHSD in parts])


def _unfused_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, attn_mask: Tensor | None) -> Tensor:
    """Scaled-dot-product attention from matrix products and a softmax: the fused kernels have no forward-mode derivative."""
    scores = (q_BHTD * q_BHTD.shape[-1] ** -0.5) @ k_BHSD.mT
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v_BHSD


class Batch(NamedTuple):
    segments: int
    q_len: int
    kv_len: int
    mask: Tensor | None  # (segments, 1, 1, kv_len), False where a shorter segment has no key


class Rows(NamedTuple):
    """`index` gathers tokens into batches, `inverse` maps each token to its row in the batches (one past the end: none)."""

    q_index: Tensor
    q_inverse: Tensor
    kv_index: Tensor
    kv_inverse: Tensor


class Batching(NamedTuple):
    """A pack split into batches. rows: None if the tokens are already in order."""

    batches: tuple[Batch, ...]
    rows: Rows | None

    def split_queries(self, x: Tensor) -> list[Tensor]:
        """Rows in the order of the batches, (T, H, …) → (B, H, q_len, …) of each batch."""
        parts = x.split([batch.segments * batch.q_len for batch in self.batches])
        shapes = [(batch.segments, batch.q_len, *x.shape[1:]) for batch in self.batches]
        return [part.view(shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    def split_keys(self, x: Tensor) -> list[Tensor]:
        """Rows in the order of the batches, (S, H, …) → (B, H, kv_len, …) of each batch."""
        parts = x.split([batch.segments * batch.kv_len for batch in self.batches])
        shapes = [(batch.segments, batch.kv_len, *x.shape[1:]) for batch in self.batches]
        return [part.view(shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    def join_queries(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_queries`, in the order of the pack; zeros for tokens in no batch."""
        return _join(parts, None if self.rows is None else self.rows.q_inverse)

    def join_keys(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_keys`, in the order of the pack; zeros for tokens in no batch."""
        return _join(parts, None if self.rows is None else self.rows.kv_inverse)


def _join(parts: Sequence[Tensor], inverse: Tensor | None) -> Tensor:
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    if inverse is None:
        return torch.cat(rows)
    return torch.cat([*rows, rows[0].new_zeros(1, *rows[0].shape[1:])]).index_select(0, inverse)


class _Gather(torch.autograd.Function):
    """Gather rows by index. Repeated rows are padding without gradient, so the backward pass is a gather too, not a scatter."""

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
def batching(q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], device: torch.device) -> Batching:
    """Batch segments of similar lengths, or keep each separate and in place if the saved copies outweigh the extra launches."""
    assert len(q_lengths) == len(kv_lengths), "one key segment for every query segment"
    segments = [i for i in range(len(q_lengths)) if q_lengths[i] and kv_lengths[i]]
    groups = _groups(segments, q_lengths, kv_lengths)
    tokens = sum(q_lengths) + sum(kv_lengths)
    if device.type == "cpu" and len(segments) == len(q_lengths) and (len(segments) - len(groups)) * TOKENS_PER_LAUNCH < tokens:
        batches = tuple(Batch(1, q_len, kv_len, None) for q_len, kv_len in zip(q_lengths, kv_lengths, strict=True))
        return Batching(batches, rows=None)

    q_starts, kv_starts = np.cumsum((0, *q_lengths)), np.cumsum((0, *kv_lengths))
    batches = []
    q_index, kv_index = [], []
    for group in groups:
        q_len, kv_len = q_lengths[group[0]], max(kv_lengths[j] for j in group)
        counts = np.array([kv_lengths[j] for j in group])
        mask = None
        if (counts < kv_len).any():
            mask = torch.from_numpy((np.arange(kv_len) < counts[:, None])[:, None, None]).to(device)
        batches.append(Batch(len(group), q_len, kv_len, mask))
        q_index += [_padded_range(q_starts[j], q_lengths[j], q_len) for j in group]
        kv_index += [_padded_range(kv_starts[j], kv_lengths[j], kv_len) for j in group]
    q_gather, q_inverse = _with_inverse(q_index, int(q_starts[-1]))
    kv_gather, kv_inverse = _with_inverse(kv_index, int(kv_starts[-1]))
    rows = Rows(q_gather.to(device), q_inverse.to(device), kv_gather.to(device), kv_inverse.to(device))
    return Batching(tuple(batches), rows)


def _groups(segments: list[int], q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]) -> list[list[int]]:
    """Group segments sorted by length while masking costs less than another kernel launch."""
    groups: list[list[int]] = []
    for i in sorted(segments, key=lambda i: (-q_lengths[i], -kv_lengths[i], i)):
        if groups:
            q_len, kv_len = q_lengths[groups[-1][0]], max(kv_lengths[j] for j in groups[-1])
            new_kv_len = max(kv_len, kv_lengths[i])
            waste = q_len * new_kv_len - q_lengths[i] * kv_lengths[i] + (new_kv_len - kv_len) * q_len * len(groups[-1])
            if waste <= PAIRS_PER_LAUNCH:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


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
