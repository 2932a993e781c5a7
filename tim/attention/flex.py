"""Attention over packs by FlexAttention (arXiv 2412.05496): one kernel over the whole pack that skips blocks without a common segment.

Legend: T query tokens, S key tokens, H heads, D head width.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tim.packed import Segments

BLOCK = 128  # tokens per side of a mask block


def flex(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    """Attention of a pack, (T, H, D); see `tim.attention.dispatch.attention`. On the CPU forward only, in memory proportional to T·S."""
    if not len(k_SHD) or not len(q_THD):
        return torch.zeros_like(q_THD)
    mask = _block_mask(q_segments.lengths, kv_segments.lengths, q_THD.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SHD, v_SHD))
    run = _compiled() if q.is_cuda else flex_attention
    return run(q, k, v, block_mask=mask)[0].transpose(0, 1)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=64)
def _block_mask(q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], device: torch.device) -> BlockMask:
    """Built on the host from the lengths. Segments are contiguous, so a row of query blocks sees one range of key blocks."""
    assert len(q_lengths) == len(kv_lengths), "one key segment for every query segment"
    q_owner, kv_owner = (np.repeat(np.arange(len(lengths)), lengths) for lengths in (q_lengths, kv_lengths))
    q_first, q_last = _ends(q_owner)
    kv_first, kv_last = _ends(kv_owner)
    touches = (q_first[:, None] <= kv_last) & (kv_first <= q_last[:, None])
    full = touches & _uniform(q_owner)[:, None] & _uniform(kv_owner)
    owners = [torch.from_numpy(owner).to(device) for owner in (q_owner, kv_owner)]

    def same_segment(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return owners[0][q] == owners[1][kv]

    return BlockMask.from_kv_blocks(
        *_ordered(touches & ~full, device),
        *_ordered(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_segment,
        seq_lengths=(len(q_owner), len(kv_owner)),
    )


def _ends(owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last segment in every block."""
    starts = np.arange(0, len(owner), BLOCK)
    return owner[starts], owner[np.minimum(starts + BLOCK, len(owner)) - 1]


def _uniform(owner: np.ndarray) -> np.ndarray:
    """Whether a block is complete and within one segment, so that it needs no mask."""
    first, last = _ends(owner)
    return (first == last) & (np.arange(1, len(first) + 1) * BLOCK <= len(owner))


def _ordered(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of set blocks per row, and the columns ordered with set blocks first."""
    counts = torch.from_numpy(blocks.sum(1).astype(np.int32))
    columns = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), columns[None, None].to(device)
