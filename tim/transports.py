"""Transports: how noise and image mix over time, and the resulting state transition identity.

A transport is one row of TiM's table (arXiv 2509.04394, appendix). It defines the noisy image x_t = α·x + σ·ε and the ideal network
output for r → t, f* = α̂·x + σ̂·ε. The rest follows. With C = σ̂_t·α_t − α̂_t·σ_t, the transition of one image and one noise is

    x_r = A·x_t + B·f,   A = (α_r·σ̂_t − σ_r·α̂_t) / C,   B = (σ_r·α_t − α_r·σ_t) / C,

and the network is exact for every r if d/dt [B·(f* − f)] = 0 along the path (state transition identity), which gives the target. The
published EDM has sigma_d cubed instead of squared, so its steps are wrong; derived this way, all five transports are exact.

Times and functions of them broadcast against x, noise and f; functions of time are evaluated in the dtype of the times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


class Transport(ABC):
    """Base class. Times decrease from `start` (noise) to `end` (image). `shifts`: whether times can shift with resolution."""

    start: ClassVar[float] = 1.0
    end: ClassVar[float] = 0.0
    shifts: ClassVar[bool] = False

    @abstractmethod
    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α(t) and σ(t): x_t = α·x + σ·ε."""

    @abstractmethod
    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α̂(t) and σ̂(t): f* = α̂·x + σ̂·ε."""

    @abstractmethod
    def interpolant_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """dα/dt and dσ/dt."""

    @abstractmethod
    def direction_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """dα̂/dt and dσ̂/dt."""

    @abstractmethod
    def time_input(self, t: Tensor) -> Tensor:
        """The network's time input."""

    @abstractmethod
    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Training times from uniform numbers in (0, 1), of the same shape, in float64."""

    def mix(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of one image and one noise."""
        return _combine(self.interpolant(t), x, noise)

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt along the path of one image and one noise."""
        return _combine(self.interpolant_rate(t), x, noise)

    def ideal(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """f*: the ideal network output at x_t for r = t, up to the average over all images and noises with this x_t."""
        return _combine(self.direction(t), x, noise)

    def target(self, x: Tensor, noise: Tensor, t: Tensor, r: Tensor, derivative: Tensor) -> Tensor:
        """The training target at (x_t, t, r), given the total derivative df/dt of the network output: f* + (B/B′)·(df*/dt − df/dt)."""
        change = _combine(self.direction_rate(t), x, noise)
        return self.ideal(x, noise, t) + self._reach(t, r).to(x.dtype) * (change - derivative)

    def step(self, x_t: Tensor, t: Tensor, r: Tensor, f: Tensor) -> Tensor:
        """x_r from x_t and the network's output f: A·x_t + B·f."""
        (alpha_t, sigma_t), (to_alpha, to_sigma), (alpha_r, sigma_r) = self.interpolant(t), self.direction(t), self.interpolant(r)
        a, b = alpha_r * to_sigma - sigma_r * to_alpha, sigma_r * alpha_t - alpha_r * sigma_t
        cross = self._cross(t)
        return _combine((a / cross, b / cross), x_t, f)

    def clean(self, x_t: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """Estimate of the noise-free image from output f at time t."""
        (_, sigma), (_, to_sigma), cross = self.interpolant(t), self.direction(t), self._cross(t)
        return _combine((to_sigma / cross, -sigma / cross), x_t, f)

    def noise(self, x_t: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """Estimate of the noise from output f at time t."""
        (alpha, _), (to_alpha, _), cross = self.interpolant(t), self.direction(t), self._cross(t)
        return _combine((-to_alpha / cross, alpha / cross), x_t, f)

    def around(self, t: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The two times of a central difference, epsilon before and after t, clamped to the transport's range."""
        return (t - epsilon).clamp(min=self.end), (t + epsilon).clamp(max=self.start)

    def tangent(self, t: Tensor) -> Tensor:
        """tan of the time, as used by the tangent weighting."""
        return torch.tan(t)

    def times(self, steps: int) -> Tensor:
        """steps + 1 times from start to end, in float64: evenly spaced."""
        return torch.linspace(self.start, self.end, steps + 1, dtype=torch.float64)

    def shift(self, t: Tensor, *, pixels: Tensor, reference: int) -> Tensor:
        """Shift times with resolution: the ratio of noise to image, σ/α, times q = sqrt(pixels / reference²) (TiM, appendix C).

        pixels: h·w of the image, broadcast against t; reference: side in pixels of the square that is not shifted.
        Raises ValueError for a transport with a fixed noise range, which a shift would leave.
        """
        kind = next(name for name, transport in TRANSPORTS.items() if isinstance(self, transport))
        alternatives = ", ".join(name for name, transport in TRANSPORTS.items() if transport.shifts)
        raise ValueError(f"transport {kind} has a fixed noise range, its times cannot shift: set shift to null, or choose {alternatives}")

    def _cross(self, t: Tensor) -> Tensor:
        """C(t)."""
        (alpha, sigma), (to_alpha, to_sigma) = self.interpolant(t), self.direction(t)
        return to_sigma * alpha - to_alpha * sigma

    def _reach(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt) at (t, r)."""
        (alpha, sigma), (to_alpha, to_sigma), (alpha_r, sigma_r) = self.interpolant(t), self.direction(t), self.interpolant(r)
        (alpha_rate, sigma_rate), (to_alpha_rate, to_sigma_rate) = self.interpolant_rate(t), self.direction_rate(t)
        cross = to_sigma * alpha - to_alpha * sigma
        cross_rate = to_sigma_rate * alpha + to_sigma * alpha_rate - to_alpha_rate * sigma - to_alpha * sigma_rate
        numerator, numerator_rate = sigma_r * alpha - alpha_r * sigma, sigma_r * alpha_rate - alpha_r * sigma_rate
        return numerator / (numerator_rate - numerator * cross_rate / cross)


@dataclass(frozen=True, slots=True)
class OptimalTransportFlow(Transport):
    """OT-FM (linear flow matching): x_t = (1 − t)·x + t·ε for t in [0, 1], f* = ε − x.

    Training times are logistic-normal: ln(t / (1 − t)) ~ N(mean, std).
    """

    mean: float = 0.0
    std: float = 1.6
    shifts: ClassVar[bool] = True

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def interpolant_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def direction_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.zeros_like(t)

    def time_input(self, t: Tensor) -> Tensor:
        return t

    def draw_times(self, uniforms: Tensor) -> Tensor:
        return torch.sigmoid(_normal(uniforms, self.mean, self.std))

    def shift(self, t: Tensor, *, pixels: Tensor, reference: int) -> Tensor:
        """t' = q·t / (1 + (q − 1)·t)."""
        q = pixels.double().sqrt() / reference
        return (q * t / (1 + (q - 1) * t)).clamp(self.end, self.start)


@dataclass(frozen=True, slots=True)
class TrigFlow(Transport):
    """TrigFlow (arXiv 2410.11081): x_t = cos t·x + sin t·ε for t in [0, π/2], f* = cos t·ε − sin t·x.

    Training times are atan σ with ln σ ~ N(mean, std).
    """

    mean: float = 0.0
    std: float = 1.6
    start: ClassVar[float] = math.pi / 2
    shifts: ClassVar[bool] = True

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t), torch.sin(t)

    def interpolant_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.sin(t), torch.cos(t)

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.sin(t), torch.cos(t)

    def direction_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.cos(t), -torch.sin(t)

    def time_input(self, t: Tensor) -> Tensor:
        return t

    def draw_times(self, uniforms: Tensor) -> Tensor:
        return torch.atan(torch.exp(_normal(uniforms, self.mean, self.std)))

    def shift(self, t: Tensor, *, pixels: Tensor, reference: int) -> Tensor:
        """t' = atan(q·tan t)."""
        return torch.atan(pixels.double().sqrt() / reference * torch.tan(t)).clamp(self.end, self.start)


@dataclass(frozen=True, slots=True)
class VariancePreserving(Transport):
    """VP diffusion (arXiv 2011.13456): x_t = (x + β·ε) / √(β² + 1) with β² = exp(9.95·t² + 0.1·t) − 1, f* = ε.

    Training times are uniform in [1e-5, 1].
    """

    end: ClassVar[float] = 1e-5

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        exponent = 9.95 * t**2 + 0.1 * t
        return torch.exp(-exponent / 2), (-torch.expm1(-exponent)).sqrt()

    def interpolant_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.interpolant(t)
        half = 9.95 * t + 0.05  # half the exponent's derivative
        return -half * alpha, half * alpha**2 / sigma

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def direction_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.zeros_like(t)

    def time_input(self, t: Tensor) -> Tensor:
        return 999 * t

    def draw_times(self, uniforms: Tensor) -> Tensor:
        return self.end + (self.start - self.end) * uniforms.double()


class _NoiseLevelTime(Transport):
    """Transports whose time is the noise level itself, from almost none to far more noise than image."""

    __slots__ = ()

    SPACING = 7  # exponent of sampling times (EDM, arXiv 2206.00364, eq. 5): short steps at low noise

    def around(self, t: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The two times of a central difference, a factor e^±epsilon from t, clamped to the transport's range."""
        return (t * math.exp(-epsilon)).clamp(min=self.end), (t * math.exp(epsilon)).clamp(max=self.start)

    def tangent(self, t: Tensor) -> Tensor:
        """The ratio of noise to image, which is the tangent of TrigFlow's time."""
        return t

    def times(self, steps: int) -> Tensor:
        """steps + 1 times from start to end, in float64: evenly spaced in t^(1/7)."""
        roots = torch.linspace(self.start ** (1 / self.SPACING), self.end ** (1 / self.SPACING), steps + 1, dtype=torch.float64)
        times = roots**self.SPACING
        times[0], times[-1] = self.start, self.end
        return times


@dataclass(frozen=True, slots=True)
class VarianceExploding(_NoiseLevelTime):
    """VE diffusion (arXiv 2011.13456): x_t = x + t·ε, f* = −ε. Training times are log-uniform in [0.02, 100]."""

    start: ClassVar[float] = 100.0
    end: ClassVar[float] = 0.02

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def interpolant_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -torch.ones_like(t)

    def direction_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.zeros_like(t)

    def time_input(self, t: Tensor) -> Tensor:
        return torch.log(t / 2)

    def draw_times(self, uniforms: Tensor) -> Tensor:
        return self.end * (self.start / self.end) ** uniforms.double()


@dataclass(frozen=True, slots=True)
class ElucidatedDiffusion(_NoiseLevelTime):
    """EDM (arXiv 2206.00364): x_t = (x + t·ε) / s with s = √(t² + sigma_d²), f* = (t·x/sigma_d − sigma_d·ε) / s.

    Training times are log-normal, ln t ~ N(mean, std); sigma_d is the standard deviation of the latents.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_d: float = 0.5
    start: ClassVar[float] = 80.0
    end: ClassVar[float] = 0.002

    def interpolant(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self._s(t)
        return 1 / s, t / s

    def interpolant_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self._s(t)
        return -t / s**3, self.sigma_d**2 / s**3

    def direction(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self._s(t)
        return t / (self.sigma_d * s), -self.sigma_d / s

    def direction_rate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self._s(t)
        return self.sigma_d / s**3, self.sigma_d * t / s**3

    def _s(self, t: Tensor) -> Tensor:
        return (t**2 + self.sigma_d**2).sqrt()

    def tangent(self, t: Tensor) -> Tensor:
        return t / self.sigma_d

    def time_input(self, t: Tensor) -> Tensor:
        return torch.log(t) / 4

    def draw_times(self, uniforms: Tensor) -> Tensor:
        return torch.exp(_normal(uniforms, self.mean, self.std)).clamp(self.end, self.start)


TRANSPORTS: dict[str, type[Transport]] = {
    "ot_fm": OptimalTransportFlow,
    "trigflow": TrigFlow,
    "vp": VariancePreserving,
    "ve": VarianceExploding,
    "edm": ElucidatedDiffusion,
}


def make(kind: str, **settings: float) -> Transport:
    """A transport by its published name. settings: `mean` and `std` of the distribution of its times, and `sigma_d`, if it has them.

    Raises ValueError for an unknown transport or setting, listing the allowed ones.
    """
    if kind not in TRANSPORTS:
        raise ValueError(f"unknown transport {kind!r}: choose one of {', '.join(TRANSPORTS)}")
    known = settings_of(kind)
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"transport {kind} has no setting {name!r}: it has {', '.join(known) or 'none'}")
        if name in ("std", "sigma_d") and not value > 0:
            raise ValueError(f"transport {name} {value}: must be above 0")
    return TRANSPORTS[kind](**settings)


def settings_of(kind: str) -> tuple[str, ...]:
    """The names of a transport's settings."""
    return tuple(field.name for field in fields(TRANSPORTS[kind]))  # pyright: ignore[reportArgumentType]


def _normal(uniforms: Tensor, mean: float, std: float) -> Tensor:
    return mean + std * torch.special.ndtri(uniforms.double())


def _combine(coefficients: tuple[Tensor, ...], first: Tensor, second: Tensor) -> Tensor:
    a, b = coefficients
    return a.to(first.dtype) * first + b.to(first.dtype) * second
