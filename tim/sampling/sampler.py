"""The any-step sampler: from noise to images in any number of transitions (TiM, arXiv 2509.04394, §4.3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from tim.model_kinds import Dtype
from tim.packed import Condition, PackedTokens
from tim.sampling.evaluation import Evaluator, Guidance, Network, PreciseNetwork, Prompts
from tim.sampling.times import check_times, time_grid
from tim.transports import OptimalTransportFlow, Transport

log = logging.getLogger(__name__)
Value = TypeVar("Value")

_NEW_NOISE = 0x9E3779B97F4A7C15  # separates an image's stream of new noise from its initial noise, which has the same seed


@dataclass(frozen=True, slots=True)
class Samples:
    """latents: (C, h, w) per image; evaluations: network forwards per image, with all conditions."""

    latents: list[Tensor]
    evaluations: list[int]


class Start(NamedTuple):
    """An image to start from. latent: (C, h, w) as the noise; kept: (h, w) bool, cells that stay as they are, or None."""

    latent: Tensor
    kept: Tensor | None = None


class Second(NamedTuple):
    """Second prompts, one per image, and the share of each in the outputs: 0 is the first prompt alone, 1 the second."""

    condition: Condition
    shares: Sequence[float]


def default_dtype(device: torch.device) -> Dtype:
    """Precision of sampling: fp32 on the CPU, fp16 on a GPU; its images are closer to those of float32 than bf16's (docs/sampling.md)."""
    return "fp16" if device.type == "cuda" else "fp32"


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
    second: Second | None = None,
    interval: tuple[float, float] | Sequence[tuple[float, float]] = (0.0, 1.0),
    starts: Sequence[Start | None] | None = None,
    stochasticity: float | Sequence[float] = 0.0,
    seeds: Sequence[int] | None = None,
    instantaneous: bool = False,
    dtype: Dtype | None = None,
    max_tokens: int | None = None,
    callback: Callable[[int, Callable[[], list[Tensor]]], None] | None = None,
) -> Samples:
    """Sample every image of a pack. An image depends on its own arguments, not on the other images.

    Args:
        noise: (C, h, w) per image, any sizes. It is scaled by the transport's sigma at the first time.
        condition, null_condition: one caption or class id per image.
        steps: one number for all images or one each, at the transport's own times.
        times: custom decreasing grids instead of `steps`, one for all images or one each.
        guidance: scale s in f_∅ + s·(f − f_∅), one for all images or one each.
        second: prompts to mix in, an evaluation more per step.
        interval: closed range of t, as shares of the transport's start, in which guidance applies; one for all images or one each.
        starts: images to add the noise to, at the first time, with cells that stay; None: an image starts from noise.
        stochasticity: share of the noise that is replaced by new noise in every step but the first and the last (OT-FM only).
        seeds: one per image, for the new noise.
        instantaneous: set r = t in the network's inputs, for a network trained with r = t only (plain flow matching).
        dtype: precision of the network's matrix products, by autocast; None: `default_dtype` of the device. An evaluation that overflows in
            fp16 is repeated in fp32.
        max_tokens: limit of a forward, to save memory; a step then takes several. An image alone may exceed it.
        callback: called as callback(step, estimates) in every step; estimates() computes the clean image that each image is heading for,
            (C, h, w) per image, and may be called before the callback returns.

    The state is float64, and times are not rounded to the network's dtype. Latents are returned as float32, in the scale of images.
    Raises ValueError for grids that do not decrease or leave the transport's range, an empty interval, guidance without a null condition,
    stochastic steps without seeds or with another transport, and an unknown dtype.
    """
    count = len(noise)
    grids = _grids(count, steps=steps, times=times, transport=transport)
    rules = Guidance(_each(guidance, count), _each(interval, count, single=isinstance(interval[0], (int, float))))
    _check_guidance(rules, null_condition=null_condition)
    shares = _each(stochasticity, count)
    _check_stochasticity(shares, transport=transport, seeds=seeds)
    if dtype is not None and dtype not in get_args(Dtype):
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(get_args(Dtype))}")
    precise = PreciseNetwork(network, default_dtype(noise[0].device) if dtype is None else dtype)

    state = _State.of(noise, starts, [grid[0] for grid in grids], patch_size=network.patch_size, transport=transport)
    prompts = Prompts(condition, null_condition, second and second.condition, second.shares if second else ())
    evaluate = Evaluator(precise, state.layout, prompts, rules, transport, instantaneous, max_tokens)
    streams = [torch.Generator().manual_seed((seed ^ _NEW_NOISE) % 2**63) for seed in seeds or []]
    finished: dict[int, Tensor] = {}
    for step in range(max(map(len, grids)) - 1):
        state = state.without(finished)
        t, r = ([grids[i][at] for i in state.images] for at in (step, step + 1))
        outputs = evaluate(state.tokens, t, r, images=state.images)
        if callback is not None:
            callback(step, partial(_estimates, state, t, outputs, finished))
        fresh = {
            k: (shares[i], streams[i]) for k, i in enumerate(state.images) if shares[i] and 0 < step < len(grids[i]) - 2
        }  # images with new noise in this step
        state.move(t, r, outputs, fresh=fresh)
        done = [i for i in state.images if step == len(grids[i]) - 2]
        finished.update(state.latents(done))
    if precise.repeated:
        log.warning("%d evaluations overflowed in fp16 and were repeated in fp32: sample this model in bf16 or fp32", precise.repeated)
    return Samples([finished[i].float() for i in range(count)], evaluate.evaluations)


@dataclass(slots=True)
class _State:
    """The images of a pack between two steps, as one sequence of tokens in float64.

    images: indices of the active ones; layout: their pack; kept, image, noise: which values stay, and what they are mixed from.
    """

    transport: Transport
    images: list[int]
    layout: PackedTokens
    tokens: Tensor
    kept: Tensor | None
    image: Tensor
    noise: Tensor

    @classmethod
    def of(
        cls,
        noise: Sequence[Tensor],
        starts: Sequence[Start | None] | None,
        times: Sequence[float],
        *,
        patch_size: int,
        transport: Transport,
    ) -> _State:
        chosen = [None] * len(noise) if starts is None else list(starts)
        packed = PackedTokens.from_latents([each.double() for each in noise], patch_size)
        images = [torch.zeros_like(z) if start is None else start.latent for z, start in zip(noise, chosen, strict=True)]
        image = (
            PackedTokens.from_latents([each.double() for each in images], patch_size).tokens if any(chosen) else packed.tokens.new_zeros(1)
        )
        kept = None
        if any(start is not None and start.kept is not None for start in chosen):
            masks = [_mask(z, start) for z, start in zip(noise, chosen, strict=True)]
            kept = PackedTokens.from_latents(masks, patch_size).tokens
        state = cls(transport, list(range(len(noise))), packed, packed.tokens, kept, image, packed.tokens)
        state.tokens = transport.mix(image, packed.tokens, state.per_token(times))
        return state

    def without(self, finished: dict[int, Tensor]) -> _State:
        """The state of the images that are not finished."""
        active = [k for k, i in enumerate(self.images) if i not in finished]
        if len(active) == len(self.images):
            return self
        rows = self.layout.rows(active)
        image = self.image.index_select(0, rows) if len(self.image) > 1 else self.image
        return _State(
            self.transport,
            [self.images[k] for k in active],
            self.layout.select(active),
            self.tokens.index_select(0, rows),
            None if self.kept is None else self.kept.index_select(0, rows),
            image,
            self.noise.index_select(0, rows),
        )

    def move(self, t: Sequence[float], r: Sequence[float], outputs: Tensor, *, fresh: dict[int, tuple[float, torch.Generator]]) -> None:
        """Take the step from t to r, one each, with the network's outputs. fresh: shares and streams of new noise, by position."""
        now, then = self.per_token(t), self.per_token(r)
        moved = self.transport.step(self.tokens, now, then, outputs)
        if fresh:
            moved += self._noise_exchange(now, then, outputs, fresh)
        if self.kept is not None:
            moved = torch.where(self.kept, self.transport.mix(self.image, self.noise, then), moved)
        self.tokens = moved

    def clean(self, t: Sequence[float], outputs: Tensor) -> dict[int, Tensor]:
        """Estimates (C, h, w) of the noise-free images, by their index."""
        estimates = self.transport.clean(self.tokens, self.per_token(t), outputs)
        if self.kept is not None:
            estimates = torch.where(self.kept, self.image, estimates)
        return dict(zip(self.images, self.layout._replace(tokens=estimates).to_latents(), strict=True))

    def latents(self, images: Sequence[int]) -> dict[int, Tensor]:
        """Final latents (C, h, w) of these images, in the scale of images."""
        if not images:
            return {}
        alpha = self.transport.interpolant(torch.tensor(self.transport.end, dtype=torch.float64))[0]
        final = self.tokens / alpha
        if self.kept is not None:
            final = torch.where(self.kept, self.image, final)
        latents = dict(zip(self.images, self.layout._replace(tokens=final).to_latents(), strict=True))
        return {image: latents[image] for image in images}

    def per_token(self, values: Sequence[float]) -> Tensor:
        """One value per image as one per token, (T, 1) in float64; a number () if all are equal."""
        per_image = torch.tensor(values, dtype=torch.float64)
        if len(set(values)) == 1:
            return per_image[0]
        return self.layout.per_token(per_image.to(self.layout.owner.device, non_blocking=True))[:, None]

    def _noise_exchange(self, t: Tensor, r: Tensor, f: Tensor, fresh: dict[int, tuple[float, torch.Generator]]) -> Tensor:
        """Change of a step from t to r when noise is removed and new noise is added: −s·ẑ·(t − r) + √(2·s·t·(t − r))·n.

        A Langevin step along the score −ẑ/t, under which the noisy images of time t keep their distribution (SiT, arXiv 2401.08740, eq. 7).
        """
        share = self.per_token([fresh[k][0] if k in fresh else 0.0 for k in range(len(self.images))])
        shapes = [
            (self.tokens.shape[1] // self.layout.patch_size**2, *(side * self.layout.patch_size for side in size))
            for size in self.layout.sizes
        ]
        drawn = [
            torch.randn(shape, generator=fresh[k][1], dtype=torch.float64) if k in fresh else torch.zeros(shape, dtype=torch.float64)
            for k, shape in enumerate(shapes)
        ]
        noise = PackedTokens.from_latents(drawn, self.layout.patch_size).tokens.to(self.tokens.device, non_blocking=True)
        return (2 * share * t * (t - r)).sqrt() * noise - share * (t - r) * self.transport.noise(self.tokens, t, f)


def _estimates(state: _State, t: Sequence[float], outputs: Tensor, finished: dict[int, Tensor]) -> list[Tensor]:
    latents = finished | state.clean(t, outputs)
    return [latents[i] for i in range(len(latents))]


def _mask(noise: Tensor, start: Start | None) -> Tensor:
    """Which values of a latent (C, h, w) stay."""
    if start is None or start.kept is None:
        return torch.zeros_like(noise, dtype=torch.bool)
    return start.kept.expand(noise.shape)


def _each(value: Value | Sequence[Value], count: int, *, single: bool | None = None) -> list[Value]:
    """One value per image."""
    is_single = isinstance(value, (int, float)) if single is None else single
    return [value] * count if is_single else list(value)  # pyright: ignore[reportArgumentType, reportReturnType]


def _check_guidance(rules: Guidance, *, null_condition: Condition | None) -> None:
    for interval in rules.intervals:
        if not interval[0] <= interval[1]:
            raise ValueError(f"guidance interval {interval}: its start is after its end")
    if any(scale != 1.0 for scale in rules.scales) and null_condition is None:
        raise ValueError("guidance other than 1 needs a null condition")


def _check_stochasticity(shares: Sequence[float], *, transport: Transport, seeds: Sequence[int] | None) -> None:
    for share in shares:
        if share and not isinstance(transport, OptimalTransportFlow):
            raise ValueError(f"stochasticity {share}: only transport ot_fm has stochastic steps; set 0")
        if not share >= 0 or (share and (seeds is None or len(seeds) != len(shares))):
            raise ValueError(f"stochasticity {share}: must be at least 0, and needs one seed for each of the {len(shares)} images")


def _grids(
    count: int, *, steps: int | Sequence[int], times: Sequence[float] | Sequence[Sequence[float]] | None, transport: Transport
) -> list[list[float]]:
    if times is None:
        per_image = [steps] * count if isinstance(steps, int) else list(steps)
        grids = [time_grid(n, transport=transport) for n in per_image]
    elif isinstance(times[0], (int, float)):
        grids = [check_times(times, transport=transport)] * count  # pyright: ignore[reportArgumentType]
    else:
        grids = [check_times(grid, transport=transport) for grid in times]  # pyright: ignore[reportArgumentType]
    if len(grids) != count:
        raise ValueError(f"{len(grids)} time grids for {count} images")
    return grids
