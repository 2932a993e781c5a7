"""The formulas of every transport: published numbers, and identities in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.functional import jvp

from tim import transports
from tim.transports import TRANSPORTS, Transport

COUNT = 1000
every = pytest.mark.parametrize("kind", TRANSPORTS)


def draw(transport: Transport, *, times: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images, noises, and random times that fall, all over the transport's range and at its ends; float64."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, COUNT, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(times, COUNT, generator=generator, dtype=torch.float64)
    grid = transport.times(1000)
    drawn = torch.where(uniforms < 0.5, transport.draw_times(uniforms * 2), grid[(uniforms * 1000).long()])
    drawn[:, 0], drawn[:, 1] = transport.start, transport.end
    return x, noise, list(drawn.sort(0, descending=True).values)


@every
def test_published_numbers(kind: str, golden: Path) -> None:
    case = {name.split(".")[1]: x for name, x in load_file(golden / "transports.safetensors").items() if name.startswith(f"{kind}.")}
    transport, (x, noise, t, r) = transports.make(kind), (case[name] for name in ("x", "z", "t", "r"))
    actual = {
        "x_t": transport.mix(x, noise, t),
        "v_t": transport.velocity(x, noise, t),
        "c_noise": transport.time_input(t),
        "target": transport.target(x, noise, t, r, case["dF"]),
        "x_r": transport.step(case["x_t"], t, r, case["dF"]),
    }
    for name in actual if kind != "edm" else ("x_t", "v_t", "c_noise"):  # the published EDM is wrong for r < t
        assert float((actual[name] - case[name]).abs().max() / case[name].abs().max()) < 1e-5, name


@every
def test_a_step_without_noise_is_exact_and_steps_compose(kind: str) -> None:
    transport = transports.make(kind)
    x, noise, (t, s, r) = draw(transport, times=3)
    start, middle, end = (transport.mix(x, noise, time) for time in (t, s, r))
    torch.testing.assert_close(transport.step(start, t, r, transport.ideal(x, noise, t)), end, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transport.step(start, t, s, transport.ideal(x, noise, t)), middle, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transport.step(middle, s, r, transport.ideal(x, noise, s)), end, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transport.clean(start, t, transport.ideal(x, noise, t)), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transport.noise(start, t, transport.ideal(x, noise, t)), noise, rtol=1e-9, atol=1e-9)


@every
def test_the_target_is_the_exact_transition_of_a_gaussian(kind: str) -> None:
    """State transition identity: where images are normal, the flow is known, and on average over the images and noises that meet in
    x_t the target, with the exact field's own derivative in it, is the exact field."""
    transport, s = transports.make(kind), 0.7
    _, x_t, (t, r) = draw(transport, times=2)
    apart = (t > r * 1.0001) & (t < 0.999 * transport.start)  # at r = t the exact field is 0/0
    x_t, t, r = x_t[apart], t[apart], r[apart]

    def spread(time: Tensor) -> Tensor:
        alpha, sigma = transport.interpolant(time)
        return (alpha**2 * s**2 + sigma**2).sqrt()

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        """What carries x_t along the flow, which keeps its place in the distribution, to r: (x_r − A·x_t) / B."""
        unmoved, carried = (
            transport.step(x_t, t, r, torch.zeros_like(x_t)),
            transport.step(torch.zeros_like(x_t), t, r, torch.ones_like(x_t)),
        )
        return (x_t * spread(r) / spread(t) - unmoved) / carried

    alpha, sigma = transport.interpolant(t)
    x, noise = alpha * s**2 * x_t / spread(t) ** 2, sigma * x_t / spread(t) ** 2  # means of all that meet in x_t
    exact, derivative = jvp(field, (x_t, t), (transport.velocity(x, noise, t), torch.ones_like(t)))
    assert isinstance(exact, Tensor)
    assert isinstance(derivative, Tensor)
    target = transport.target(x, noise, t, r, derivative)
    torch.testing.assert_close(target, exact, rtol=1e-5, atol=1e-5)
    far = t > 2 * r
    assert float((transport.ideal(x, noise, t) - exact)[far].abs().max()) > 0.1, "the first term alone would do, this proves nothing"


@every
def test_velocity_is_the_derivative_of_the_path(kind: str) -> None:
    transport = transports.make(kind)
    x, noise, (t,) = draw(transport, times=1)
    inside = t > transport.end
    x, noise, t = x[inside], noise[inside], t[inside]
    derivative = jvp(lambda time: transport.mix(x, noise, time), t, torch.ones_like(t))[1]
    torch.testing.assert_close(transport.velocity(x, noise, t), derivative)


@every
def test_times_stay_in_range(kind: str) -> None:
    transport = transports.make(kind)
    extremes = torch.tensor([2.0**-53, 1e-6, 0.5, 1 - 1e-6, 1 - 2.0**-53], dtype=torch.float64)
    times = transport.draw_times(extremes)
    assert transport.end <= float(times.min()) < float(times.max()) <= transport.start
    assert all(earlier <= later for earlier, later in pairwise(times.tolist()))
    for earlier, later in (transport.around(times, 0.005), transport.around(transport.times(4), 0.3)):
        assert (earlier < later).all()
        assert transport.end <= float(earlier.min()) < float(later.max()) <= transport.start
        assert torch.isfinite(transport.time_input(earlier)).all()
    assert transport.times(5).tolist()[0::5] == [transport.start, transport.end]
    assert all(later < earlier for earlier, later in pairwise(transport.times(5).tolist()))


def test_laws_of_the_times() -> None:
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    normal = {
        "ot_fm": torch.logit(transports.make("ot_fm", mean=-0.4, std=1.2).draw_times(uniforms)),
        "trigflow": torch.tan(transports.make("trigflow", mean=-0.4, std=1.2).draw_times(uniforms)).log(),
        "edm": transports.make("edm", mean=-0.4, std=1.2).draw_times(uniforms).log(),
    }
    for kind, logarithms in normal.items():
        assert float(logarithms.mean()) == pytest.approx(-0.4, abs=1e-3), kind
        assert float(logarithms.std()) == pytest.approx(1.2, abs=1e-2), kind
    middle = torch.tensor([0.5], dtype=torch.float64)
    assert transports.make("ve").draw_times(middle).item() == pytest.approx(math.sqrt(0.02 * 100))
    assert transports.make("vp").draw_times(middle).item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("kind", ["ot_fm", "trigflow"])
def test_a_shift_multiplies_the_ratio_of_noise_to_image(kind: str) -> None:
    transport = transports.make(kind)
    t = transport.times(10)[1:-1]
    torch.testing.assert_close(transport.shift(t, pixels=torch.tensor(1024**2), reference=1024), t)
    shifted = transport.shift(t, pixels=torch.tensor(4096 * 1024), reference=1024)
    (alpha, sigma), (shifted_alpha, shifted_sigma) = transport.interpolant(t), transport.interpolant(shifted)
    torch.testing.assert_close(shifted_sigma / shifted_alpha, 2 * sigma / alpha)
    ends = transport.shift(transport.times(1), pixels=torch.tensor(64), reference=1024)
    assert ends.tolist() == pytest.approx([transport.start, transport.end])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown transport 'cosine': choose one of ot_fm, trigflow, vp, ve, edm"):
        transports.make("cosine")
    with pytest.raises(ValueError, match="transport ve has no setting 'mean': it has none"):
        transports.make("ve", mean=1.0)
    with pytest.raises(ValueError, match="transport ot_fm has no setting 'sigma_d': it has mean, std"):
        transports.make("ot_fm", sigma_d=1.0)
    with pytest.raises(ValueError, match=r"transport sigma_d 0\.0: must be above 0"):
        transports.make("edm", sigma_d=0.0)
    for kind in ("vp", "ve", "edm"):
        with pytest.raises(ValueError, match=f"transport {kind} has a fixed noise range.*choose ot_fm, trigflow"):
            transports.make(kind).shift(torch.ones(1), pixels=torch.ones(1), reference=1)
