"""The any-step sampler: from noise to images in as many transitions as asked for (TiM, arXiv 2509.04394, §4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from tim.packed import Condition, PackedTokens, join, select
from tim.transports import OptimalTransportFlow, Transport

FRESH = 0x9E3779B97F4A7C15  # parts an image's stream of new noise from the noise that it starts with


class Network(Protocol):
    """What the sampler needs of a network: `TransitionTransformer` is one."""

    @property
    def patch_size(self) -> int: ...

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /) -> PackedTokens: ...


@dataclass(frozen=True, slots=True)
class Samples:
    """latents: (C, h, w) per image; evaluations: forwards of the network per image, conditional and unconditional counted alike."""

    latents: list[Tensor]
    evaluations: list[int]


def time_grid(steps: int, *, transport: Transport, pixels: int | None = None, shift: int | None = None) -> list[float]:
    """steps + 1 times from noise to image, as the transport spaces them, in float64; shifted for an image of so many pixels if `shift`,
    the side of the reference square, is given.

    Raises ValueError for fewer than one step, and for a shift that the transport does not have.
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
    callback: Callable[[int, list[Tensor]], None] | None = None,
) -> Samples:
    """Carry every image of a pack from noise to its end.

    noise: (C, h, w) per image, any sizes; condition, null_condition: one caption or class id per image; steps: for all images or one
    number each, at the transport's own times; times: custom grids instead, falling; guidance s: f_∅ + s·(f − f_∅) where `interval`
    (closed, in shares of the transport's start) holds t; stochasticity: how much noise is exchanged for new in every step but the first
    and the last (OT-FM only), drawn for each image from its own one of `seeds`; instantaneous: the network was trained with r = t alone
    (plain flow matching) and is told so in every step; callback(step, clean estimates) after every step.
    The state is kept in float64, times are never rounded to the network's dtype. Noise is scaled by what the transport says of the first
    time, latents are given back in the scale of images.
    Raises ValueError for grids that do not fall or leave the transport's range, an empty interval, guidance without a null condition, and
    stochastic steps without seeds or of another transport.
    """
    count = len(noise)
    scales = [float(guidance)] * count if isinstance(guidance, (int, float)) else [float(g) for g in guidance]
    grids = _grids(count, steps=steps, times=times, transport=transport)
    if interval[0] > interval[1]:
        raise ValueError(f"guidance interval {interval}: its start is after its end")
    if stochasticity and not isinstance(transport, OptimalTransportFlow):
        raise ValueError(f"stochasticity {stochasticity}: only transport ot_fm has stochastic steps; set 0")
    if stochasticity < 0 or (stochasticity and (seeds is None or len(seeds) != count)):
        raise ValueError(f"stochasticity {stochasticity}: must be at least 0, and needs one seed for each of the {count} images")
    if any(scale != 1.0 for scale in scales) and null_condition is None:
        raise ValueError("guidance other than 1 needs a null condition")

    state = [z.double() * transport.interpolant(torch.tensor(grid[0]).double())[1] for z, grid in zip(noise, grids, strict=True)]
    scale = transport.interpolant(torch.tensor(transport.end).double())[0]
    streams = [torch.Generator().manual_seed((seed ^ FRESH) % 2**63) for seed in seeds or []]
    evaluations = [0] * count
    for step in range(max(len(grid) for grid in grids) - 1):
        active = [i for i in range(count) if step < len(grids[i]) - 1]
        guided = [i for i in active if scales[i] != 1.0 and interval[0] <= grids[i][step] / transport.start <= interval[1]]
        packed = PackedTokens.from_latents([state[i] for i in active + guided], network.patch_size)
        device = packed.tokens.device
        t = torch.tensor([grids[i][step] for i in active + guided], dtype=torch.float64)
        r = torch.tensor([grids[i][step + 1] for i in active + guided], dtype=torch.float64)
        asked = [select(condition, active)]
        if guided:
            assert null_condition is not None
            asked.append(select(null_condition, guided))
        out = network(
            packed._replace(tokens=packed.tokens.float()),
            transport.time_input(t).to(device, torch.float32),
            transport.time_input(t if instantaneous else r).to(device, torch.float32),
            join(asked),
        )
        outputs = [f.double() for f in out.to_latents()]
        directions = dict(zip(active, outputs, strict=False))
        for i, unconditional in zip(guided, outputs[len(active) :], strict=True):
            directions[i] = unconditional + scales[i] * (directions[i] - unconditional)
            evaluations[i] += 1
        estimates = [x / scale for x in state]
        for position, i in enumerate(active):
            evaluations[i] += 1
            if callback is not None:
                estimates[i] = transport.clean(state[i], t[position], directions[i])
            moved = transport.step(state[i], t[position], r[position], directions[i])
            if stochasticity and 0 < step < len(grids[i]) - 2:
                moved += _exchange(state[i], t[position], r[position], directions[i], transport, share=stochasticity, stream=streams[i])
            state[i] = moved
        if callback is not None:
            callback(step, estimates)
    return Samples([(x / scale).float() for x in state], evaluations)


def _exchange(x_t: Tensor, t: Tensor, r: Tensor, f: Tensor, transport: Transport, *, share: float, stream: torch.Generator) -> Tensor:
    """What a step from t to r changes by taking some noise out and new noise in: −s·ẑ·(t − r) + √(2·s·t·(t − r))·n.

    A Langevin step along the score −ẑ/t, under which the noisy images of time t keep their distribution (SiT, arXiv 2401.08740, eq. 7).
    """
    fresh = torch.randn(x_t.shape, generator=stream, dtype=torch.float64).to(x_t.device)
    return (2 * share * t * (t - r)).sqrt() * fresh - share * (t - r) * transport.noise(x_t, t, f)


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
            raise ValueError(f"times {grid}: a grid needs two times or more, each smaller than the one before")
        if grid[0] > transport.start or grid[-1] < transport.end:
            raise ValueError(f"times {grid}: this transport's times go from {transport.start:g} to {transport.end:g}")
    return grids
