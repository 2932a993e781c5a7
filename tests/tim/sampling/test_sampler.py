from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tim.test_objective import Gaussian
from tim import PackedText, PackedTokens, TransitionTransformer, sample, transports
from tim.packed import Condition
from tim.sampling.times import time_grid

OT = transports.make("ot_fm")
TEXT = PackedText.from_features([torch.zeros(1, 1)])


def test_the_exact_field_lands_on_the_same_image_in_any_number_of_steps() -> None:
    noise = torch.randn(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 4, 32):
        result = sample(Gaussian(0.5), [noise], TEXT, transport=OT, steps=steps)
        torch.testing.assert_close(result.latents[0].double(), 0.5 * noise, rtol=1e-5, atol=1e-5)
        assert result.evaluations == [steps]


def test_an_image_does_not_depend_on_its_neighbours(tiny: TransitionTransformer) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(3, h, w, generator=generator) for h, w in ((4, 4), (2, 8), (8, 4))]
    captions = [torch.randn(m, 16, generator=generator) for m in (3, 1, 2)]
    null = torch.zeros(1, 16)
    settings = [(1, 2.0), (4, 1.0), (3, 1.5)]
    together = sample(
        tiny,
        noise,
        PackedText.from_features(captions),
        transport=OT,
        steps=[s for s, _ in settings],
        guidance=[g for _, g in settings],
        null_condition=PackedText.from_features([null] * 3),
        stochasticity=0.3,
        seeds=[7, 8, 9],
    )
    assert together.evaluations == [2, 4, 6]
    for i, (steps, guidance) in enumerate(settings):
        alone = sample(
            tiny,
            [noise[i]],
            PackedText.from_features([captions[i]]),
            transport=OT,
            steps=steps,
            guidance=guidance,
            null_condition=PackedText.from_features([null]),
            stochasticity=0.3,
            seeds=[7 + i],
        )
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-3, atol=1e-4)


def test_a_network_of_plain_flow_matching_is_told_r_equals_t() -> None:
    class Asked:
        patch_size = 1

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition) -> PackedTokens:
            self.times.append((float(t), float(r)))
            return packed._replace(tokens=torch.zeros_like(packed.tokens))

    for instantaneous, told in ((False, [(1.0, 0.5), (0.5, 0.0)]), (True, [(1.0, 1.0), (0.5, 0.5)])):
        network = Asked()
        sample(network, [torch.zeros(1, 2, 2)], TEXT, transport=OT, steps=2, instantaneous=instantaneous)
        assert network.times == told


def test_guidance_moves_away_from_the_null_condition_and_its_interval_is_closed() -> None:
    class TellsCaption:
        patch_size = 1

        def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition) -> PackedTokens:
            assert isinstance(condition, PackedText)
            return packed._replace(tokens=packed.per_token(condition.features[:, :1]))

    noise, caption, null = torch.zeros(1, 1, 1), PackedText.from_features([torch.ones(1, 1)]), PackedText.from_features([torch.zeros(1, 1)])

    def run(interval: tuple[float, float]) -> tuple[float, int]:
        result = sample(TellsCaption(), [noise], caption, transport=OT, steps=1, guidance=3.0, null_condition=null, interval=interval)
        return float(result.latents[0]), result.evaluations[0]

    assert run((0.0, 1.0)) == (-3.0, 2)
    assert run((0.0, 0.9)) == (-1.0, 1)


def test_the_callback_sees_the_clean_estimate() -> None:
    seen: list[tuple[int, Tensor]] = []
    noise = torch.ones(1, 2, 2)
    result = sample(Gaussian(0.5), [noise], TEXT, transport=OT, steps=3, callback=lambda step, x: seen.append((step, x()[0])))
    assert [step for step, _ in seen] == [0, 1, 2]
    torch.testing.assert_close(seen[-1][1].float(), result.latents[0])


def test_stochastic_steps_change_the_image_and_keep_the_distribution() -> None:
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))

    def run(stochasticity: float, seed: int, steps: int = 64) -> Tensor:
        return sample(Gaussian(0.5), [noise], TEXT, transport=OT, steps=steps, stochasticity=stochasticity, seeds=[seed]).latents[0]

    plain, one, other = run(0.0, 1), run(1.0, 1), run(1.0, 2)
    assert torch.equal(one, run(1.0, 1))
    for image in (one, other):
        assert float(image.std()) == pytest.approx(0.5, abs=0.02)
        assert abs(float(image.mean())) < 0.03
    similarity = torch.corrcoef(torch.stack([plain.flatten(), one.flatten(), other.flatten()]))
    assert (similarity[[0, 0, 1], [1, 2, 2]] < 0.7).all()
    assert torch.equal(run(0.0, 1, steps=2), run(1.0, 1, steps=2)), "the first and the last step exchange no noise"


def test_grids_are_exact_and_shift_towards_noise_on_large_images() -> None:
    assert time_grid(4, transport=OT) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = time_grid(2, transport=OT, pixels=2048**2, shift=1024)
    assert shifted == pytest.approx([1.0, 2 / 3, 0.0])
    for kind in ("ot_fm", "trigflow"):
        transport = transports.make(kind)
        for pixels in range(16, 100_000, 97):
            grid = time_grid(3, transport=transport, pixels=pixels, shift=7)
            assert transport.start >= grid[0] > grid[1] > grid[2] > grid[3] >= transport.end, "not even by a rounding error outside"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "0 steps: at least 1"),
        ({"times": [1.0, 0.5, 0.5]}, "each smaller than the one before"),
        ({"times": [1.0]}, "at least two times"),
        ({"guidance": 2.0}, "needs a null condition"),
        ({"times": [1.5, 0.0]}, "this transport's times run from 1 to 0"),
        ({"times": [0.2, 0.7]}, "each smaller than the one before"),
        ({"stochasticity": 0.2}, "needs one seed for each of the 1 images"),
        ({"stochasticity": 0.2, "seeds": [1], "transport": transports.make("ve")}, "only transport ot_fm has stochastic steps"),
        ({"interval": (0.8, 0.2)}, "its start is after its end"),
        ({"steps": [1, 2]}, "2 time grids for 1 images"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(Gaussian(1.0), [torch.zeros(1, 2, 2)], TEXT, **{"transport": OT, **arguments})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", transports.TRANSPORTS)
def test_every_transport_carries_a_gaussian_to_its_end_in_any_number_of_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, s = transports.make(kind), 0.5
    monkeypatch.setattr(type(transport), "time_input", lambda self, t: t)

    class Field:
        """The exact transition where images are normal with standard deviation s."""

        patch_size = 1

        def __call__(self, packed: PackedTokens, t: torch.Tensor, r: torch.Tensor, condition: Condition) -> PackedTokens:
            ratio = spread(r) / spread(t)
            nothing, one = torch.zeros(1), torch.ones(1)
            f = (ratio - transport.step(one, t, r, nothing)) / transport.step(nothing, t, r, one)
            return packed._replace(tokens=packed.tokens * f)

    def spread(t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = transport.interpolant(t)
        return (alpha**2 * s**2 + sigma**2).sqrt()

    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    for steps in (1, 3, 8):
        latent = sample(Field(), [noise], TEXT, transport=transport, steps=steps).latents[0]
        torch.testing.assert_close(latent, s * noise, rtol=5e-3, atol=5e-3)
