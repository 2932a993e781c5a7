"""Transports: how noise and image mix over time, and what that makes of the transition identity.

A transport holds the formulas of one row of TiM's table (arXiv 2509.04394, appendix): x_t = α(t)·x + σ(t)·ε, the network's
target, the step from t to r and the law of the training times. Times and their functions have shape (B,) or a token's shape (T, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OptimalTransportFlow:
    """OT-FM (linear flow matching): x_t = (1 − t)·x + t·ε for t in [0, 1], direction ε − x.

    Training times are logistic-normal: ln(t / (1 − t)) ~ N(mean, std).
    """

    mean: float = 0.0
    std: float = 1.6
    start: float = 1.0
    end: float = 0.0

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α(t) and σ(t)."""
        return 1 - t, t

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt along the path of one image and one noise."""
        return noise - x

    def target(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, derivative: Tensor) -> Tensor:
        """What the network should say at (x_t, t, r), given the total derivative df/dt of what it says (state transition identity)."""
        return noise - x - (t - r) * derivative

    def step(self, x_t: Tensor, t: Tensor, r: Tensor, f: Tensor) -> Tensor:
        """x_r from x_t and the network's output f."""
        return x_t - (t - r) * f

    def clean(self, x_t: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """The estimate of the noise-free image that goes with output f at time t."""
        return x_t - t * f

    def time_input(self, t: Tensor) -> Tensor:
        """The time as the network sees it."""
        return t

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Training times from uniform numbers in (0, 1), of the same shape, in float64."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniforms.double()))


TRANSPORTS = {"ot_fm": OptimalTransportFlow}
Transport = OptimalTransportFlow


def make(kind: str, *, mean: float = 0.0, std: float = 1.6) -> Transport:
    """A transport by its published name. Raises ValueError for an unknown one."""
    if kind not in TRANSPORTS:
        raise ValueError(f"unknown transport {kind!r}: choose one of {', '.join(TRANSPORTS)}")
    if std <= 0:
        raise ValueError(f"transport std {std}: must be above 0")
    return TRANSPORTS[kind](mean=mean, std=std)


def shift_time(t: Tensor, *, pixels: Tensor, reference: int) -> Tensor:
    """Time shift with resolution, t' = q·t / (1 + (q − 1)·t), q = sqrt(pixels / reference²) (TiM, appendix C).

    t in [0, 1]; pixels: h·w of the image, broadcast against t; reference: the side in pixels of the square that is left as it is.
    """
    q = pixels.double().sqrt() / reference
    return q * t / (1 + (q - 1) * t)
