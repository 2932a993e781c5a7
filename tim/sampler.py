"""The any-step sampler: from noise to images in any number of transitions (TiM, arXiv 2509.04394, §4.3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, get_args

import torch
from torch import Tensor

from tim.layers import autocast
from tim.model_kinds import Dtype
from tim.packed import Condition, PackedTokens, join, select
from tim.transports import OptimalTransportFlow, Transport

log = logging.getLogger(__name__)

_NEW_NOISE = 0x9E3779B97F4A7C15  # separates an image's stream of new noise from its initial noise, which has the same seed


class Network(Protocol):
    """The interface the sampler needs; `TransitionTransformer` has it."""

    @property
    def patch_size(self) -> int: ...

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /) -> PackedTokens: ...


@dataclass(frozen=True, slots=True)
class Samples:
    """latents: (C, h, w) per image; evaluations: network forwards per image, conditional plus unconditional."""

    latents: list[Tensor]
    evaluations: list[int]


def default_dtype(device: torch.device) -> Dtype:
    """Precision of sampling: fp32 on the CPU, fp16 on a GPU; its images are closer to those of float32 than bf16's (docs/sampling.md)."""
    return "fp16" if device.type == "cuda" else "fp32"


def time_grid(steps: int, *, transport: Transport, pixels: int | None = None, shift: int | None = None) -> list[float]:
    """steps + 1 times from noise to image in float64, spaced by the transport. With `shift`, the side of the reference square in pixels,
    the times are shifted for an image of `pixels` pixels.

    Raises ValueError for fewer than one step, and for a shift that the transport does not support.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1 is needed")
    grid = transport.times(steps)
    if shift is not None and pixels is not None:
        grid = transport.shift(grid, pixels=torch.tensor(pixels), reference=shift)
    return grid.tolist()


@torch.no_grad()
def sample(
    network: Network,
    noise: Sequence[Tensor],
    condition: Condition,
    *,
    transport: Transport,
    steps: int | Sequence[int] = 8,
    times: Sequence[float] | Sequence[Sequence[float]] | None = None,
    guidance: float | Sequence[float] = 1.0,
    null_condition: Condition | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    stochasticity: float = 0.0,
    seeds: Sequence[int] | None = None,
    instantaneous: bool = False,
    dtype: Dtype | None = None,
    callback: Callable[[int, list[Tensor]], None] | None = None,
) -> Samples:
    """Sample every image of a pack.

    Args:
        noise: (C, h, w) per image, any sizes. It is scaled by the transport's sigma at the first time.
        condition, null_condition: one caption or class id per image.
        steps: one number for all images or one each, at the transport's own times.
        times: custom decreasing grids instead of `steps`, one for all images or one each.
        guidance: scale s in f_∅ + s·(f − f_∅), one for all images or one each.
        interval: closed range of t, as shares of the transport's start, in which guidance applies.
        stochasticity: share of the noise that is replaced by new noise in every step but the first and the last (OT-FM only).
        seeds: one per image, for the new noise.
        instantaneous: set r = t in the network's inputs, for a network trained with r = t only (plain flow matching).
        dtype: precision of the network's matrix products, by autocast; None: `default_dtype` of the device. An evaluation that overflows in
            fp16 is repeated in fp32.
        callback: called as callback(step, clean estimates) after every step.

    The state is float64, and times are not rounded to the network's dtype. Latents are returned as float32, in the scale of images.
    Raises ValueError for grids that do not decrease or leave the transport's range, an empty interval, guidance without a null condition,
    stochastic steps without seeds or with another transport, and an unknown dtype.
    """
    count = len(noise)
    scales = [float(guidance)] * count if isinstance(guidance, (int, float)) else [float(g) for g in guidance]
    grids = _grids(count, steps=steps, times=times, transport=transport)
    _check_guidance(scales, interval=interval, null_condition=null_condition)
    _check_stochasticity(stochasticity, count=count, transport=transport, seeds=seeds)
    if dtype is not None and dtype not in get_args(Dtype):
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(get_args(Dtype))}")
    precise = _PreciseNetwork(network, default_dtype(noise[0].device) if dtype is None else dtype)
    model = _GuidedNetwork(precise, transport, condition, null_condition, scales, interval, instantaneous, evaluations=[0] * count)

    state = [z.double() * transport.interpolant(torch.tensor(grid[0]).double())[1] for z, grid in zip(noise, grids, strict=True)]
    clean_scale = transport.interpolant(torch.tensor(transport.end).double())[0]
    streams = [torch.Generator().manual_seed((seed ^ _NEW_NOISE) % 2**63) for seed in seeds or []]
    for step in range(max(map(len, grids)) - 1):
        active = [i for i in range(count) if step < len(grids[i]) - 1]
        t = torch.tensor([grids[i][step] for i in active], dtype=torch.float64)
        r = torch.tensor([grids[i][step + 1] for i in active], dtype=torch.float64)
        outputs = model.predict(state, t, r, images=active)
        estimates = [x / clean_scale for x in state]
        for i, t_i, r_i, f in zip(active, t, r, outputs, strict=True):
            if callback is not None:
                estimates[i] = transport.clean(state[i], t_i, f)
            x_r = transport.step(state[i], t_i, r_i, f)
            if stochasticity and 0 < step < len(grids[i]) - 2:
                x_r += _noise_exchange(state[i], t_i, r_i, f, transport, share=stochasticity, stream=streams[i])
            state[i] = x_r
        if callback is not None:
            callback(step, estimates)
    if precise.repeated:
        log.warning("%d evaluations overflowed in fp16 and were repeated in fp32: sample this model in bf16 or fp32", precise.repeated)
    return Samples([(x / clean_scale).float() for x in state], model.evaluations)


@dataclass(slots=True)
class _PreciseNetwork:
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


@dataclass(frozen=True, slots=True)
class _GuidedNetwork:
    """A network with classifier-free guidance for the images of one pack. `evaluations` counts its forwards per image."""

    network: Network
    transport: Transport
    condition: Condition
    null_condition: Condition | None
    scales: list[float]
    interval: tuple[float, float]
    instantaneous: bool
    evaluations: list[int]

    def predict(self, state: Sequence[Tensor], t: Tensor, r: Tensor, *, images: Sequence[int]) -> list[Tensor]:
        """Guided outputs in float64 for `images` at t and r, one each. Conditional and unconditional evaluations share one forward."""
        guided = [k for k, i in enumerate(images) if self._is_guided(i, float(t[k]))]
        rows = [*range(len(images)), *guided]
        conditions = [select(self.condition, images)]
        if guided:
            assert self.null_condition is not None
            conditions.append(select(self.null_condition, [images[k] for k in guided]))

        packed = PackedTokens.from_latents([state[images[k]] for k in rows], self.network.patch_size)
        device = packed.tokens.device
        out = self.network(
            packed._replace(tokens=packed.tokens.float()),
            self.transport.time_input(t[rows]).to(device, torch.float32),
            self.transport.time_input((t if self.instantaneous else r)[rows]).to(device, torch.float32),
            join(conditions),
        )
        outputs = [f.double() for f in out.to_latents()]
        for k, unconditional in zip(guided, outputs[len(images) :], strict=True):
            outputs[k] = unconditional + self.scales[images[k]] * (outputs[k] - unconditional)
        for k in rows:
            self.evaluations[images[k]] += 1
        return outputs[: len(images)]

    def _is_guided(self, image: int, t: float) -> bool:
        return self.scales[image] != 1.0 and self.interval[0] <= t / self.transport.start <= self.interval[1]


def _noise_exchange(x_t: Tensor, t: Tensor, r: Tensor, f: Tensor, transport: Transport, *, share: float, stream: torch.Generator) -> Tensor:
    """Change of a step from t to r when noise is removed and new noise is added: −s·ẑ·(t − r) + √(2·s·t·(t − r))·n.

    A Langevin step along the score −ẑ/t, under which the noisy images of time t keep their distribution (SiT, arXiv 2401.08740, eq. 7).
    """
    fresh = torch.randn(x_t.shape, generator=stream, dtype=torch.float64).to(x_t.device)
    return (2 * share * t * (t - r)).sqrt() * fresh - share * (t - r) * transport.noise(x_t, t, f)


def _check_guidance(scales: Sequence[float], *, interval: tuple[float, float], null_condition: Condition | None) -> None:
    if interval[0] > interval[1]:
        raise ValueError(f"guidance interval {interval}: its start is after its end")
    if any(scale != 1.0 for scale in scales) and null_condition is None:
        raise ValueError("guidance other than 1 needs a null condition")


def _check_stochasticity(stochasticity: float, *, count: int, transport: Transport, seeds: Sequence[int] | None) -> None:
    if stochasticity and not isinstance(transport, OptimalTransportFlow):
        raise ValueError(f"stochasticity {stochasticity}: only transport ot_fm has stochastic steps; set 0")
    if stochasticity < 0 or (stochasticity and (seeds is None or len(seeds) != count)):
        raise ValueError(f"stochasticity {stochasticity}: must be at least 0, and needs one seed for each of the {count} images")


def _grids(
    count: int, *, steps: int | Sequence[int], times: Sequence[float] | Sequence[Sequence[float]] | None, transport: Transport
) -> list[list[float]]:
    if times is None:
        per_image = [steps] * count if isinstance(steps, int) else list(steps)
        grids = [time_grid(n, transport=transport) for n in per_image]
    elif isinstance(times[0], (int, float)):
        grids = [[float(t) for t in times]] * count  # pyright: ignore[reportArgumentType]
    else:
        grids = [[float(t) for t in grid] for grid in times]  # pyright: ignore[reportGeneralTypeIssues]
    if len(grids) != count:
        raise ValueError(f"{len(grids)} time grids for {count} images")
    for grid in grids:
        if len(grid) < 2 or any(later >= earlier for earlier, later in pairwise(grid)):
            raise ValueError(f"times {grid}: a grid needs at least two times, each smaller than the one before")
        if grid[0] > transport.start or grid[-1] < transport.end:
            raise ValueError(f"times {grid}: this transport's times run from {transport.start:g} to {transport.end:g}")
    return grids
