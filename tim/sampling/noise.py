"""The noise that images start from: drawn on the CPU from each image's own seed, the same on every device and in every pack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tim.sampling.requests import ImageRequest

Shape = tuple[int, int, int]


def initial_noise(request: ImageRequest, shape: Shape) -> Tensor:
    """Noise (C, h, w) of an image. A generator is not moved: the same request has the same noise each time."""
    noise = _normal(shape, _from(request.seed))
    if request.variation is None:
        return noise
    angle = request.variation.share * math.pi / 2  # unit variance at every share
    return math.cos(angle) * noise + math.sin(angle) * _normal(shape, _from(request.variation.seed))


def stochastic_seed(request: ImageRequest, shape: Shape) -> int:
    """Seed of the noise of stochastic steps."""
    if not isinstance(request.seed, torch.Generator):
        return request.seed
    generator = _from(request.seed)
    _normal(shape, generator)
    return _next_seed(generator)


def with_own_generators(requests: Sequence[ImageRequest], shapes: Sequence[Shape]) -> list[ImageRequest]:
    """Requests whose generators, if they have any, are in the state that their image starts from.

    Several images may be given one generator. It moves on image by image, in their order, whatever packs they are drawn in.
    """
    return [
        replace(request, seed=_taken(request.seed, shape)) if isinstance(request.seed, torch.Generator) else request
        for request, shape in zip(requests, shapes, strict=True)
    ]


def _taken(generator: torch.Generator, shape: Shape) -> torch.Generator:
    """A copy of a generator, which moves on by what an image takes."""
    copy = _from(generator)
    _normal(shape, generator)
    _next_seed(generator)
    return copy


def _from(seed: int | torch.Generator) -> torch.Generator:
    """A new generator with this seed, or in the state of this one."""
    if isinstance(seed, torch.Generator):
        return torch.Generator(seed.device).set_state(seed.get_state())
    return torch.Generator().manual_seed(seed)


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).cpu()


def _next_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
