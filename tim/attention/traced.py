"""Attention inside blocks that torch.compile traces: lengths are not values of the compiled code, so that it fits every pack.

Scaled-dot-product attention splits a pack by its lengths, which cannot be traced. On the CPU it is one operator of the graph instead, with
the lengths as a tensor.

Legend: T query tokens, S key tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tim.attention.sdpa import Batching, batching

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sdpa_traced(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, q_ends: Tensor, kv_ends: Tensor) -> Tensor:
    """`tim.attention.sdpa.sdpa` on the CPU as one operator. q_ends, kv_ends: cumulative lengths of the segments, from 0."""
    return _forward(q_THD, k_SHD, v_SHD, q_ends, kv_ends)[0]


@torch.library.custom_op("tim::sdpa", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, kv_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the attention, (T, H, D), and the logarithm of the softmax's denominator, (T, H)."""
    plan = _plan(q_ends, kv_ends)
    if not plan.batches:
        return q.new_zeros(q.shape), torch.zeros(q.shape[:2], dtype=_sum_dtype(q))
    inputs = zip(_queries(plan, q), _keys(plan, k), _keys(plan, v), _masks(plan, q.dtype), strict=True)
    parts = [_flash(*qkv, attn_mask=mask) for *qkv, mask in inputs]
    return plan.join_queries([out for out, _ in parts]), plan.join_queries([log_sum for _, log_sum in parts])


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, kv_ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=_sum_dtype(q))


@torch.library.custom_op("tim::sdpa_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, q_ends: Tensor, kv_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(q_ends, kv_ends)
    if not plan.batches:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    # Rows that only fill a batch repeat a token: without gradient they change nothing.
    of_queries = [_queries(plan, q), _queries(plan, out), _queries(plan, log_sums), plan.split_queries(_without_filling(plan, grad))]
    of_keys = [_keys(plan, k), _keys(plan, v)]
    parts = [
        _flash_backward(g, a, b, c, o, log_sum, 0.0, False, attn_mask=mask)
        for a, o, log_sum, g, b, c, mask in zip(*of_queries, *of_keys, _masks(plan, q.dtype), strict=True)
    ]
    dq, dk, dv = zip(*parts, strict=True)
    return plan.join_queries(dq), plan.join_keys(dk), plan.join_keys(dv)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, q_ends: Tensor, kv_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, q_ends, kv_ends, out, log_sums = ctx.saved_tensors
    return (*_backward(grad, q, k, v, out, log_sums, q_ends, kv_ends), None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def _plan(q_ends: Tensor, kv_ends: Tensor) -> Batching:
    """How to split the pack, without the empty segments that only pad it."""
    pairs = [pair for pair in zip(q_ends.diff().tolist(), kv_ends.diff().tolist(), strict=True) if any(pair)]
    return batching(tuple(q for q, _ in pairs), tuple(kv for _, kv in pairs), q_ends.device)


def _queries(plan: Batching, x: Tensor) -> Sequence[Tensor]:
    return plan.split_queries(x if plan.rows is None else x.index_select(0, plan.rows.q_index))


def _keys(plan: Batching, x: Tensor) -> Sequence[Tensor]:
    return plan.split_keys(x if plan.rows is None else x.index_select(0, plan.rows.kv_index))


def _without_filling(plan: Batching, grad: Tensor) -> Tensor:
    """The gradient in the order of the batches, zero for rows that are no token's."""
    if plan.rows is None:
        return grad
    rows = grad.new_zeros(len(plan.rows.q_index) + 1, *grad.shape[1:])
    return rows.index_copy_(0, plan.rows.q_inverse, grad)[:-1]


def _masks(plan: Batching, dtype: torch.dtype) -> list[Tensor | None]:
    """Masks as the operators need them: added to the scores."""
    masks = [batch.mask for batch in plan.batches]
    return [None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf) for mask in masks]
