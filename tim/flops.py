"""Floating-point operations and activation memory of a pack, from the network's parameters and the segment lengths.

Only matrix products count (2 operations per multiply-add), without recomputation by kernels or activation checkpointing.
`torch.utils.flop_counter` counts the same.

Legend: T tokens of a pack, S text tokens, B images, D network width, M hidden width of a block's MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tim.layers import TimeEmbedding, mlp_width
from tim.network import modulation_rank


@dataclass(frozen=True, slots=True)
class Lengths:
    """tokens: number per image; text: number per caption, None for a class model."""

    tokens: Sequence[int]
    text: Sequence[int] | None

    def of(self, images: Sequence[int]) -> Lengths:
        """Lengths of some of the images."""
        return Lengths([self.tokens[i] for i in images], None if self.text is None else [self.text[i] for i in images])


def forward_flops(params: Mapping[str, Any], lengths: Lengths, *, alignment: bool = False) -> int:
    """One forward pass of a pack. params: complete, with the published names; alignment: include the projection."""
    return _inputs(params, lengths) + _first_layers(params, lengths) + _rest(params, lengths, alignment=alignment)


def backward_flops(params: Mapping[str, Any], lengths: Lengths, *, alignment: bool = False) -> int:
    """One backward pass: twice the forward, except that tokens and times need no gradient."""
    return _first_layers(params, lengths) + 2 * (_inputs(params, lengths) + _rest(params, lengths, alignment=alignment))


def step_flops(params: Mapping[str, Any], lengths: Lengths, *, moving: Sequence[int], alignment: bool = False) -> int:
    """A training step: forward and backward of the pack, and two forwards of its r < t images, with indices `moving`."""
    derivative = 2 * forward_flops(params, lengths.of(moving)) if moving else 0
    return forward_flops(params, lengths, alignment=alignment) + backward_flops(params, lengths, alignment=alignment) + derivative


def activation_bytes(params: Mapping[str, Any], lengths: Lengths, *, precision: str = "fp32", checkpoint_every: int = 0) -> int:
    """Memory kept for the backward pass, including the block being recomputed: by far the largest part of a step's peak.

    precision: fp32, or bf16 (autocast); checkpoint_every: as in `TransitionTransformer.configure_execution`.
    """
    width, depth = params["hidden_size"], params["depth"]
    mlp = mlp_width(width)
    full, half = 4, 4 if precision == "fp32" else 2
    copies = 0 if precision == "fp32" else full  # half-precision queries and keys are normalised as float32 copies
    # Each part: input and normalised input, then scale, modulated input, output and gate.
    around = 2 * full + 4 * half
    per_token = width * (around + 3 * half + 2 * copies + 2 * half + 2 * half) + width * around + 4 * mlp * half
    if lengths.text is not None:
        per_token += width * (around + (copies or half) + half + 2 * half)
    block = sum(lengths.tokens) * per_token + sum(lengths.text or ()) * width * (4 * half + copies)
    last = sum(lengths.tokens) * width * (2 * full + 2 * half)  # the final layer
    if not checkpoint_every:
        return depth * block + last
    recomputed = depth // checkpoint_every
    return (depth - recomputed + 1) * block + recomputed * sum(lengths.tokens) * width * half + last


def _linear(rows: int, *widths: tuple[int, int]) -> int:
    return 2 * rows * sum(fan_in * fan_out for fan_in, fan_out in widths)


def _swiglu(width: int, hidden: int, out: int) -> tuple[tuple[int, int], ...]:
    return (width, hidden), (width, hidden), (hidden, out)


def _first_layers(params: Mapping[str, Any], lengths: Lengths) -> int:
    """The patch embedding and the first layer of each time embedding, whose inputs need no gradient."""
    width, features = params["hidden_size"], params["patch_size"] ** 2 * params["in_channels"]
    return _linear(sum(lengths.tokens), (features, width)) + _linear(
        _times(params) * len(lengths.tokens), (2 * TimeEmbedding.FREQUENCIES, width)
    )


def _inputs(params: Mapping[str, Any], lengths: Lengths) -> int:
    """The rest of the embeddings."""
    width = params["hidden_size"]
    text = 0 if lengths.text is None else _linear(sum(lengths.text), *_swiglu(params["cap_feat_dim"], 4 * width, width))
    return text + _linear(_times(params) * len(lengths.tokens), (width, width))


def _times(params: Mapping[str, Any]) -> int:
    """Number of time embeddings per image in a forward pass."""
    return 1 + len(params["new_condition"].split(","))


def _rest(params: Mapping[str, Any], lengths: Lengths, *, alignment: bool) -> int:
    """Blocks, final layer and projection."""
    width, tokens, images = params["hidden_size"], sum(lengths.tokens), len(lengths.tokens)
    modulations = 6 if lengths.text is None else 9
    block = _linear(images, *_swiglu(width, modulation_rank(params), modulations * width))
    block += _linear(tokens, (width, 3 * width), (width, width), *_swiglu(width, mlp_width(width), width))
    block += 4 * width * sum(n * n for n in lengths.tokens)
    if params["distance_aware"]:
        block += _linear(images, (width, 3 * width))
    if lengths.text is not None:
        block += _linear(tokens, (width, width), (width, width)) + _linear(sum(lengths.text), (width, 2 * width))
        block += 4 * width * sum(n * m for n, m in zip(lengths.tokens, lengths.text, strict=True))
    final = _linear(images, *_swiglu(width, width // 2, 2 * width))
    final += _linear(tokens, (width, params["patch_size"] ** 2 * params["in_channels"]))
    hidden, out = params["projector_dim"], params["z_dim"]
    projection = _linear(tokens, (width, hidden), (hidden, hidden), (hidden, out)) if alignment else 0
    return params["depth"] * block + final + projection
