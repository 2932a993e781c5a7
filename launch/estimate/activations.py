"""Memory of the network's passes over a pack, from the network itself.

The network runs with fake tensors, which have shapes but no values, for one and two blocks and one large pack. Bytes grow linearly with
tokens and with blocks, in the forward pass and in the backward pass, so that these two runs give those of any pack and depth. What does
not grow with tokens are the copies of weights that autocast keeps. Parameters that are not trained keep no input for their gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.hardware.tensor_memory import TensorMemory
from tim import PackedText, PackedTokens, TransitionTransformer
from tim.flops import Lengths, activation_bytes
from tim.layers import autocast
from tim.model_kinds import Dtype
from tim.packed import Condition

TRACED_TOKENS = 8192  # of the packs that are traced
HALF = 2  # bytes of a number in half precision
Pass = Literal["train", "evaluate"]
Limit = Callable[[nn.Module], None]


class Line(NamedTuple):
    """A number of bytes that grows with the tokens of a pack."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Bytes that a pass takes beyond weights and gradients, as a function of the pack: the most of several lines."""

    lines: tuple[Line, ...]

    def of(self, tokens: int) -> float:
        return max(line.at(tokens) for line in self.lines)


def pass_bytes(
    params: Mapping[str, Any],
    *,
    rope: str,
    text_share: float,
    kind: Pass = "train",
    precision: Dtype = "fp32",
    checkpoint_every: int = 0,
    alignment: bool = False,
    limit: Limit | None = None,
) -> PassBytes:
    """Memory of a pass over packs with `text_share` tokens of captions per token of images.

    Args:
        params: complete, with the published names.
        kind: train: forward and backward, with the gradients of earlier packs there; evaluate: forward without gradient.
        precision: of matrix products, by autocast. Its copies of weights count.
        alignment: whether the pass returns the projection for the alignment teacher.
        limit: makes a part of the network trainable.
    """
    every, depth = max(1, checkpoint_every), int(params["depth"])
    first = 2 if alignment else 1  # the projection's activations, after the first block, stay while the next one runs
    depths = sorted({min(depth, first * every), min(depth, (first + 1) * every)}) if kind == "train" else [1]
    text = round(text_share * TRACED_TOKENS) if params.get("num_classes") is None else 0
    per_token: list[tuple[float, float]] = []
    for blocks in depths:
        part = {**params, "depth": blocks, "encoder_depth": 1}
        peaks = _trace(json.dumps(part, sort_keys=True), rope, text, kind, precision, checkpoint_every, alignment, limit)
        copies = _weight_copies(part, kind=kind, precision=precision, checkpoint_every=checkpoint_every, limit=limit)
        per_token.append((max(0.0, peaks[0] - copies[0]) / TRACED_TOKENS, max(0.0, peaks[1] - copies[1]) / TRACED_TOKENS))
    copies = _weight_copies(params, kind=kind, precision=precision, checkpoint_every=checkpoint_every, limit=limit)
    slopes = [_extrapolate(depths, [each[phase] for each in per_token], depth) for phase in range(2)]
    return PassBytes(tuple(Line(fixed, slope) for fixed, slope in zip(copies, slopes, strict=True)))


def _weight_copies(
    params: Mapping[str, Any], *, kind: Pass, precision: Dtype, checkpoint_every: int, limit: Limit | None
) -> tuple[float, float]:
    """Bytes of the weights' copies in half precision, at the end of the forward pass and in the backward pass.

    Autocast keeps those of trained weights until it ends, and the backward pass needs all those of blocks that are not computed again.
    """
    if precision == "fp32":
        return 0.0, 0.0
    parameters = parameters_of(params, limit=limit).values()
    total = HALF * sum(math.prod(each.shape) for each in parameters if each.trained or kind == "train")
    return total, total if kind == "evaluate" or not checkpoint_every else total * (1 - 1 / checkpoint_every)


def _extrapolate(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """Value at a place on the line through one or two points."""
    if len(places) == 1:
        return values[0]
    return values[0] + (values[1] - values[0]) / (places[1] - places[0]) * (place - places[0])


@lru_cache(maxsize=256)
def _trace(
    params: str,
    rope: str,
    text: int,
    kind: Pass,
    precision: Dtype,
    checkpoint_every: int,
    alignment: bool,
    limit: Limit | None,
) -> tuple[int, int]:
    """Peaks of the forward and the backward pass over one image, beyond weights and gradients. params: as JSON, so that it is hashable."""
    with torch.device("meta"):
        network = TransitionTransformer.from_official(json.loads(params), rope=rope)
    network.configure_execution(checkpoint_every=checkpoint_every)
    device, class_ids = torch.device("cpu"), torch.zeros(1, dtype=torch.int64)  # ids have values: the network checks them
    with FakeTensorMode(allow_non_fake_inputs=True), TensorMemory() as memory:
        network.to_empty(device=device)
        if limit is not None:
            limit(network)
        parameters = list(network.parameters())
        memory.add(parameters)
        inputs = _inputs(network, class_ids, tokens=TRACED_TOKENS, text=text)
        if kind == "evaluate":
            before = memory.now
            memory.restart()
            with torch.no_grad(), autocast(device, precision):
                network(*inputs)
            return memory.peak - before, memory.peak - before
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        before = memory.now
        memory.restart()
        with autocast(device, precision):
            out, projection = network(*inputs, return_alignment=True) if alignment else (network(*inputs), None)
        forward = memory.peak - before
        loss = out.tokens.square().sum() if projection is None else out.tokens.square().sum() + projection.float().square().sum()
        memory.restart()
        loss.backward()
        return forward, memory.peak - before


def _inputs(
    network: TransitionTransformer, class_ids: torch.Tensor, *, tokens: int, text: int
) -> tuple[PackedTokens, torch.Tensor, torch.Tensor, Condition]:
    """A pack of one image with a caption or a class."""
    p = network.patch_size
    packed = PackedTokens.from_latents([torch.empty(network.channels, p, tokens * p)], p)
    times = torch.empty(1)
    if network.classes is not None:
        return packed, times, times, class_ids
    return packed, times, times, PackedText.from_features([torch.empty(max(1, text), network.params["cap_feat_dim"])])


def quick_pass_bytes(params: Mapping[str, Any], *, text_share: float, precision: Dtype, checkpoint_every: int) -> PassBytes:
    """Memory of a training pass by formulas (`tim.flops`), at once and to 10 %: without alignment, and with all parameters trained."""
    lengths = Lengths([TRACED_TOKENS], None if params.get("num_classes") else [round(text_share * TRACED_TOKENS)])
    kept = activation_bytes(params, lengths, precision="fp32" if precision == "fp32" else "bf16", checkpoint_every=checkpoint_every)
    copies = 0 if precision == "fp32" else 2 * sum(math.prod(each.shape) for each in parameters_of(params).values())
    lines = Line(0.0 if checkpoint_every else copies, kept / TRACED_TOKENS), Line(copies, 0.0)
    return PassBytes(lines)


class Parameter(NamedTuple):
    """A parameter of a network: its shape, and whether it is trained."""

    shape: tuple[int, ...]
    trained: bool


def parameters_of(params: Mapping[str, Any], *, limit: Limit | None = None) -> dict[str, Parameter]:
    """The parameters of a network by name. Takes no memory."""
    with torch.device("meta"):
        network = TransitionTransformer.from_official(dict(params))
        if limit is not None:
            limit(network)
    return {name: Parameter(tuple(each.shape), each.requires_grad) for name, each in network.named_parameters()}
