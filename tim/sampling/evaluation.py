"""Evaluations of the network for the images of a pack: guidance, mixed prompts, and packs larger than one forward may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tim.layers import autocast
from tim.model_kinds import Dtype
from tim.packed import Condition, PackedTokens, join, select
from tim.transports import Transport


class Network(Protocol):
    """The interface the sampler needs; `TransitionTransformer` has it."""

    @property
    def patch_size(self) -> int: ...

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /) -> PackedTokens: ...


@dataclass(slots=True)
class PreciseNetwork:
    """A network under autocast. `repeated` counts the evaluations that overflowed in fp16 and were repeated in fp32."""

    network: Network
    dtype: Dtype
    repeated: int = 0

    @property
    def patch_size(self) -> int:
        return self.network.patch_size

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /) -> PackedTokens:
        device = packed.tokens.device
        with autocast(device, self.dtype):
            out = self.network(packed, t, r, condition)
        if self.dtype == "fp16" and not bool(torch.isfinite(out.tokens).all()):
            self.repeated += 1
            with autocast(device, "fp32"):
                out = self.network(packed, t, r, condition)
        return out


class Prompts(NamedTuple):
    """What the images of a pack are conditioned on: one caption or class id per image.

    null: what guidance moves away from; second: prompts whose outputs are mixed in; shares: of the second prompt, in [0, 1], one per image.
    """

    condition: Condition
    null: Condition | None
    second: Condition | None
    shares: Sequence[float]


class Guidance(NamedTuple):
    """Guidance per image. scales: s in f_∅ + s·(f − f_∅); intervals: closed ranges of t, as shares of the transport's start, in which it
    applies."""

    scales: Sequence[float]
    intervals: Sequence[tuple[float, float]]


class _Row(NamedTuple):
    """One image in a forward: its position among the active images, its condition, and the coefficient of its output."""

    position: int
    condition: Condition
    coefficient: float


class _Term(NamedTuple):
    """Outputs of a forward to add up: `outputs` times `coefficient` goes to the rows `tokens` of the pack."""

    outputs: slice
    tokens: slice | Tensor
    coefficient: float | Tensor


class _Forward(NamedTuple):
    """A forward that is repeated step by step: its layout and condition, the rows of the pack that it reads (None: all), and its terms."""

    layout: PackedTokens
    condition: Condition
    positions: list[int]
    tokens: Tensor | None
    terms: list[_Term]


@dataclass(slots=True)
class Evaluator:
    """Evaluates a network for the images of a pack. `evaluations` counts its forwards per image.

    layout: the pack; its tokens are not used. max_tokens: limit of a forward, which an image alone may exceed; None: a forward per step.
    instantaneous: set r = t in the network's inputs.

    The output of an image is a sum over its conditions: with guidance s and a second prompt of share w,
    s·(1 − w)·f(first) + s·w·f(second) + (1 − s)·f(null).
    """

    network: Network
    layout: PackedTokens
    prompts: Prompts
    guidance: Guidance
    transport: Transport
    instantaneous: bool = False
    max_tokens: int | None = None
    evaluations: list[int] = field(init=False)
    _plans: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[_Forward]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.evaluations = [0] * len(self.layout.sizes)

    def __call__(self, tokens: Tensor, t: Sequence[float], r: Sequence[float], *, images: Sequence[int]) -> Tensor:
        """Outputs (T, F) in float64 for the tokens (T, F) of `images`, indices into the pack, at times t and r, one each."""
        forwards = self._planned(tuple(images), tuple(self._is_guided(i, time) for i, time in zip(images, t, strict=True)))
        device = tokens.device
        now = self.transport.time_input(torch.tensor(t, dtype=torch.float64)).float()
        then = now if self.instantaneous else self.transport.time_input(torch.tensor(r, dtype=torch.float64)).float()
        result = torch.zeros_like(tokens)
        for forward in forwards:
            read = tokens if forward.tokens is None else tokens.index_select(0, forward.tokens)
            packed = forward.layout._replace(tokens=read.float())
            now_here, then_here = (each[forward.positions].to(device, non_blocking=True) for each in (now, then))
            out = self.network(packed, now_here, then_here, forward.condition).tokens
            for term in forward.terms:
                result[term.tokens] += term.coefficient * out[term.outputs].double()
            for position in forward.positions:
                self.evaluations[images[position]] += 1
        return result

    def _is_guided(self, image: int, t: float) -> bool:
        low, high = self.guidance.intervals[image]
        return self.guidance.scales[image] != 1.0 and low <= t / self.transport.start <= high

    def _planned(self, images: tuple[int, ...], guided: tuple[bool, ...]) -> list[_Forward]:
        key = (images, guided)
        if key not in self._plans:
            self._plans[key] = self._plan(images, guided)
        return self._plans[key]

    def _plan(self, images: tuple[int, ...], guided: tuple[bool, ...]) -> list[_Forward]:
        """The forwards of a step in which these images are active."""
        layout = self.layout._replace(tokens=self.layout.tokens[:, :0]).select(images)
        rows = [row for terms in self._terms(images, guided) for row in terms]
        forwards: list[list[_Row]] = []
        room = 0
        for row in rows:
            length = layout.segments.lengths[row.position]
            if not forwards or (self.max_tokens is not None and length > room):
                forwards.append([])
                room = self.max_tokens or 0
            forwards[-1].append(row)
            room -= length
        return [_forward(layout, each) for each in forwards]

    def _terms(self, images: tuple[int, ...], guided: tuple[bool, ...]) -> list[list[_Row]]:
        """Rows with a coefficient other than zero: those of the first prompts, of the second prompts, and without a prompt."""
        prompts = self.prompts
        terms: list[list[_Row]] = [[], [], []]
        for position, (image, is_guided) in enumerate(zip(images, guided, strict=True)):
            scale = self.guidance.scales[image] if is_guided else 1.0
            share = prompts.shares[image] if prompts.second is not None else 0.0
            coefficients = scale * (1 - share), scale * share, 1 - scale
            for term, condition, coefficient in zip(terms, (prompts.condition, prompts.second, prompts.null), coefficients, strict=True):
                if coefficient:
                    assert condition is not None
                    term.append(_Row(position, select(condition, [image]), coefficient))
        return terms


def _forward(layout: PackedTokens, rows: Sequence[_Row]) -> _Forward:
    positions = [row.position for row in rows]
    everything = positions == list(range(len(layout.sizes)))
    return _Forward(
        layout.select(positions),
        join([row.condition for row in rows]),
        positions,
        None if everything else layout.rows(positions),
        _sum_of(layout, rows),
    )


def _sum_of(layout: PackedTokens, rows: Sequence[_Row]) -> list[_Term]:
    """The terms of a forward. No term has an image twice, so that each adds to every token once and sums have one order."""
    runs: list[list[_Row]] = []
    for row in rows:
        if not runs or row.position <= runs[-1][-1].position:
            runs.append([])
        runs[-1].append(row)
    lengths, terms, start = layout.segments.lengths, [], 0
    for run in runs:
        positions = [row.position for row in run]
        tokens = sum(lengths[i] for i in positions)
        first, last = positions[0], positions[-1]
        begin = sum(lengths[:first])
        consecutive = positions == list(range(first, last + 1))
        terms.append(
            _Term(
                slice(start, start + tokens),
                slice(begin, begin + tokens) if consecutive else layout.rows(positions),
                _per_token([row.coefficient for row in run], [lengths[i] for i in positions], device=layout.tokens.device),
            )
        )
        start += tokens
    return terms


def _per_token(values: Sequence[float], lengths: Sequence[int], *, device: torch.device) -> float | Tensor:
    """A value per image as one per token, (T, 1) in float64; a number if all are equal."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(lengths))[:, None].to(device, non_blocking=True)
