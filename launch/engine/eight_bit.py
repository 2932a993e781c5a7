"""AdamW with 8-bit moments, by bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861), and its state in checkpoints.

A moment is a code of 8 bits per weight, and a scale for every block of 256 weights of the flat vector that the optimizer updates: 2 bytes
per weight instead of 8. Biases and gains keep 32 bits.

Checkpoints store codes and scales, not dequantised moments: quantising them again does not give the same scales, because the code of
the first moment has 1 but not -1. Where a block of the new layout lies in one saved block, which is everywhere if the layout is the same,
codes and scales are copied, and a run resumes bit by bit. The other blocks are dequantised and quantised again, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import adamw
from torch import Tensor
from torch.nn.functional import pad

from launch.checkpoints.tensor_fragments import Fragment, ShardedTensors
from launch.engine.deepspeed_internals import Share
from launch.engine.moments import Moments, Pieces
from launch.engine.replicated import Replicated

BLOCK = 256  # weights per scale, fixed in bitsandbytes
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}  # by kind, their number in bitsandbytes' state
CODES, SCALES = "_codes", "_scales"


class AdamW8bit(adamw.AdamW8bit):
    """bitsandbytes' AdamW. Groups with `is_matrix` have 8-bit moments, the others 32-bit ones, however many weights a rank has of them."""

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        self.create_state(p, is_8bit=group["is_matrix"])

    def create_state(self, weights: Tensor, *, is_8bit: bool) -> dict[str, Any]:
        """State of a vector of weights before the first update."""
        state = self.state[weights]
        state["step"] = 0
        for number, code in enumerate(("dynamic", "udynamic"), start=1):
            state[f"state{number}"] = torch.zeros_like(weights, dtype=torch.uint8 if is_8bit else torch.float32)
            if is_8bit:
                self.name2qmap[code] = self.name2qmap[code].to(weights.device)
                state[f"qmap{number}"] = self.name2qmap[code]
                state[f"absmax{number}"] = torch.zeros(-(-weights.numel() // BLOCK), device=weights.device)
        return state


class ReplicatedAdamW8bit(Replicated, AdamW8bit):
    """8-bit AdamW under ZeRO 0."""


class EightBitMoments(Moments):
    """Moments of `AdamW8bit` in checkpoints.

    Kinds: `exp_avg` and `exp_avg_sq` of biases and gains; of the others `…_codes`, one byte per weight, and `…_scales`, one number per
    block. The start of a fragment of scales is that of its first block, which may lie before the fragment's codes, even below 0.
    """

    def __init__(self, optimizer: AdamW8bit) -> None:
        kinds = [kind + suffix for suffix in ("", CODES, SCALES) for kind in MOMENTS]
        super().__init__(optimizer, kinds, counts_in_tensors=False)
        self._adam = optimizer

    def fragments(self, shares: Mapping[str, Share]) -> dict[str, dict[str, Fragment]]:
        moments: dict[str, dict[str, Fragment]] = {kind: {} for kind in self.kinds}
        for name, share in shares.items():
            state = self._adam.state.get(share.weights, {})
            for kind, number in MOMENTS.items() if state else ():
                values = share.of(state[f"state{number}"])
                if f"absmax{number}" not in state:
                    moments[kind][name] = values
                    continue
                moments[kind + CODES][name] = values
                blocks = slice(share.offset // BLOCK, -(-(share.offset + share.count) // BLOCK))
                moments[kind + SCALES][name] = Fragment(share.start - share.offset % BLOCK, state[f"absmax{number}"][blocks])
        return moments

    @torch.no_grad()
    def load(self, pieces: Pieces, shares: Mapping[str, Share], *, updates: int) -> None:
        vectors: dict[Tensor, dict[str, Share]] = {}
        for name, share in shares.items():
            vectors.setdefault(share.weights, {})[name] = share
        for kind, number in MOMENTS.items():
            whole, codes, scales = (pieces(kind + suffix) for suffix in ("", CODES, SCALES))
            for weights, parts in vectors.items():
                if any(name in codes for name in parts):
                    self._load_blocks(number, weights, {name: share for name, share in parts.items() if name in codes}, codes, scales)
                elif saved := {name: share for name, share in parts.items() if name in whole}:
                    vector = self._state(weights, is_8bit=False)[f"state{number}"]
                    whole.read_into({name: share.of(vector) for name, share in saved.items()})
        self._set_count(updates)

    def _load_blocks(
        self, number: int, weights: Tensor, parts: Mapping[str, Share], saved_codes: ShardedTensors, saved_scales: ShardedTensors
    ) -> None:
        """Fill the 8-bit moment of a vector of weights. What the checkpoint does not have, such as padding, is 0."""
        state = self._state(weights, is_8bit=True)
        code = state[f"qmap{number}"].cpu()
        codes = torch.full((weights.numel(),), int((code == 0).nonzero()[0]), dtype=torch.uint8)
        scales = torch.full((weights.numel(),), math.nan)  # of every weight
        for name, share in parts.items():
            stop = share.start + share.count
            at = slice(share.offset, share.offset + share.count)
            codes[at] = saved_codes.read(name, start=share.start, stop=stop)
            scales[at] = _scales_of_elements(saved_codes, saved_scales, name, start=share.start, stop=stop)
        codes, scales = _in_blocks(codes, scales, code=code)
        state[f"state{number}"].view(-1).copy_(codes)
        state[f"absmax{number}"].copy_(scales)

    def _state(self, weights: Tensor, *, is_8bit: bool) -> dict[str, Any]:
        return self._adam.state[weights] or self._adam.create_state(weights, is_8bit=is_8bit)


def _scales_of_elements(codes: ShardedTensors, scales: ShardedTensors, name: str, *, start: int, stop: int) -> Tensor:
    """Scale of each of the elements start … stop of a parameter."""
    result = torch.full((stop - start,), math.nan)
    for (first, of_elements), (first_block, of_blocks) in zip(codes.pieces(name), scales.pieces(name), strict=True):
        (count,) = of_elements.get_shape()
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            skipped = (low - first_block) // BLOCK
            repeated = of_blocks[skipped : (high - 1 - first_block) // BLOCK + 1].repeat_interleave(BLOCK)
            offset = first_block + skipped * BLOCK
            result[low - start : high - start] = repeated[low - offset : high - offset]
    return result


def _in_blocks(codes: Tensor, scales: Tensor, *, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of elements, and scales of blocks. Given are scales of elements, not a number where there is none.

    Blocks whose elements have different scales are quantised again.
    """
    padding = -len(codes) % BLOCK
    in_blocks, of_elements = pad(codes, (0, padding)).view(-1, BLOCK), pad(scales, (0, padding), value=math.nan).view(-1, BLOCK)
    missing = of_elements.isnan()
    low, high = of_elements.masked_fill(missing, math.inf).amin(1), of_elements.masked_fill(missing, -math.inf).amax(1)
    result = torch.where(low <= high, high, 0.0)
    mixed = low < high
    if mixed.any():
        values = code[in_blocks[mixed].long()] * of_elements[mixed].nan_to_num(0.0)
        again, state = functional.quantize_blockwise(values.flatten(), code=code, blocksize=BLOCK)
        in_blocks[mixed], result[mixed] = again.view(-1, BLOCK), state.absmax
    return in_blocks.flatten()[: len(codes)], result
