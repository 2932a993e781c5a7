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
    return _first_layers(params, lengths) + _later_layers(params, lengths, alignment=alignment) + _attention(params, lengths)


def backward_flops(params: Mapping[str, Any], lengths: Lengths, *, alignment: bool = False, trained: float = 1.0) -> int:
    """One backward pass. trained: share of the weights of matrices that are not frozen (of LoRA: of the adapters in all).

    Each layer's product is taken once for the gradient of its input and once for that of its weights; tokens and times need no gradient.
    Both products of attention are taken twice.
    """
    first, later = _first_layers(params, lengths), _later_layers(params, lengths, alignment=alignment)
    return later + round(trained * (first + later)) + 2 * _attention(params, lengths)


def step_flops(params: Mapping[str, Any], lengths: Lengths, *, moving: Sequence[int], alignment: bool = False, trained: float = 1.0) -> int:
    """A training step: forward and backward of the pack, and two forwards of its r < t images, with indices `moving`.

    trained: as of `backward_flops`.
    """
    derivative = 2 * forward_flops(params, lengths.of(moving)) if moving else 0
    backward = backward_flops(params, lengths, alignment=alignment, trained=trained)
    return forward_flops(params, lengths, alignment=alignment) + backward + derivative


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


def _times(params: Mapping[str, Any]) -> int:
    """Number of time embeddings per image in a forward pass."""
    return 1 + len(params["new_condition"].split(","))


def _later_layers(params: Mapping[str, Any], lengths: Lengths, *, alignment: bool) -> int:
    """The rest of the embeddings, the layers of the blocks, final layer and projection."""
    width, tokens, images = params["hidden_size"], sum(lengths.tokens), len(lengths.tokens)
    inputs = _linear(_times(params) * images, (width, width))
    modulations = 6 if lengths.text is None else 9
    block = _linear(images, *_swiglu(width, modulation_rank(params), modulations * width))
    block += _linear(tokens, (width, 3 * width), (width, width), *_swiglu(width, mlp_width(width), width))
    if params["distance_aware"]:
        block += _linear(images, (width, 3 * width))
    if lengths.text is not None:
        inputs += _linear(sum(lengths.text), *_swiglu(params["cap_feat_dim"], 4 * width, width))
        block += _linear(tokens, (width, width), (width, width)) + _linear(sum(lengths.text), (width, 2 * width))
    final = _linear(images, *_swiglu(width, width // 2, 2 * width))
    final += _linear(tokens, (width, params["patch_size"] ** 2 * params["in_channels"]))
    hidden, out = params["projector_dim"], params["z_dim"]
    projection = _linear(tokens, (width, hidden), (hidden, hidden), (hidden, out)) if alignment else 0
    return inputs + params["depth"] * block + final + projection


def _attention(params: Mapping[str, Any], lengths: Lengths) -> int:
    """Products of queries, keys and values in all blocks."""
    pairs = sum(n * n for n in lengths.tokens)
    if lengths.text is not None:
        pairs += sum(n * m for n, m in zip(lengths.tokens, lengths.text, strict=True))
    return 4 * params["depth"] * params["hidden_size"] * pairs
