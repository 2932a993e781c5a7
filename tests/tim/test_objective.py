from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tim.tiny import TINY
from tim import PackedText, PackedTokens, TransitionObjective, TransitionTransformer, transports
from tim.objective import CONSISTENCY, DIFFUSION, TRANSITION, Guide, Losses
from tim.packed import Condition

OT = transports.make("ot_fm")


class Gaussian:
    """The exact transition field where images are normal with standard deviation s: f(x_t, t, r) = (x_t − x_r) / (t − r)."""

    patch_size = 1

    def __init__(self, s: float) -> None:
        self.s = s

    def spread(self, t: torch.Tensor) -> torch.Tensor:
        return ((1 - t) ** 2 * self.s**2 + t**2).sqrt()

    def __call__(self, packed: PackedTokens, t: torch.Tensor, r: torch.Tensor, condition: Condition) -> PackedTokens:
        t_T, r_T = packed.per_token(t.double())[:, None], packed.per_token(r.double())[:, None]
        velocity = packed.tokens * (t_T - (1 - t_T) * self.s**2) / self.spread(t_T) ** 2
        jump = packed.tokens * (1 - self.spread(r_T) / self.spread(t_T)) / (t_T - r_T).clamp(min=1e-9)
        return packed._replace(tokens=torch.where(t_T == r_T, velocity, jump))


def test_the_exact_field_is_what_the_targets_average_to() -> None:
    """State transition identity: over many (image, noise) pairs that meet in x_t, the mean target is the exact transition."""
    s, t, r = 0.5, 0.7, 0.2
    generator = torch.Generator().manual_seed(0)
    x_t = 0.8
    spread = (1 - t) ** 2 * s**2 + t**2
    noise = x_t * t / spread + math.sqrt((1 - t) ** 2 * s**2 / spread) * torch.randn(200_000, generator=generator, dtype=torch.float64)
    clean = (x_t - t * noise) / (1 - t)
    field = Gaussian(s)
    text = PackedText.from_features([torch.zeros(1, 1)])
    packed = PackedTokens.from_latents([clean.view(1, 1, -1)], 1)
    objective = TransitionObjective(OT, patch_size=1, shift=None, epsilon=1e-4)
    times, ends = torch.tensor([t], dtype=torch.float64), torch.tensor([r], dtype=torch.float64)
    derivative, _ = objective.path_derivative(field, packed, noise[:, None], text, t=times, r=ends)
    target = OT.target(clean[:, None], noise[:, None], times[0], ends[0], derivative)
    exact = field(packed._replace(tokens=torch.full_like(packed.tokens, x_t)), times, ends, text).tokens[0]
    torch.testing.assert_close(target.mean(0), exact, rtol=0, atol=0.01)
    assert float((noise - clean).mean()) != pytest.approx(float(exact), abs=0.05), "the velocity alone would do, this proves nothing"


def test_kinds_decide_r_and_uniforms_decide_t() -> None:
    objective = TransitionObjective(OT, patch_size=1, shift=None)
    uniforms = torch.tensor([[0.2, 0.9], [0.9, 0.2], [0.2, 0.9]], dtype=torch.float64)
    t, r = objective.draw_times(uniforms, torch.tensor([DIFFUSION, CONSISTENCY, TRANSITION]), [torch.zeros(3, 4, 4)] * 3)
    later, earlier = OT.draw_times(torch.tensor([0.9, 0.2]))
    assert t.tolist() == pytest.approx([float(later)] * 3)
    assert r.tolist() == pytest.approx([float(later), 0.0, float(earlier)])


def test_a_loss_does_not_depend_on_neighbours_or_kinds_beside_it(tiny: TransitionTransformer) -> None:
    """Nor on the guide's and the teacher's view of them."""
    generator = torch.Generator().manual_seed(1)
    network = TransitionTransformer.from_official({**TINY, "z_dim": 8, "projector_dim": 8, "encoder_depth": 1})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    latents, noise = ([torch.randn(3, h, w, generator=generator) for h, w in ((4, 4), (2, 6), (4, 8))] for _ in range(2))
    teacher = [torch.randn(latent[0].numel() // 4, 8, generator=generator) for latent in latents]
    captions = [torch.randn(m, 16, generator=generator) for m in (2, 3, 1)]
    kinds = torch.tensor([TRANSITION, DIFFUSION, CONSISTENCY])
    uniforms = torch.rand(3, 2, generator=generator, dtype=torch.float64)
    objective = TransitionObjective(OT, patch_size=2, shift=None)

    def run(images: list[int], weights: list[float], *, guided: bool = True) -> Losses:
        null = PackedText.from_features([torch.zeros(1, 16)] * len(images))
        return objective(
            network,
            [latents[i] for i in images],
            PackedText.from_features([captions[i] for i in images]),
            noise=[noise[i] for i in images],
            kinds=kinds[images],
            uniforms=uniforms[images],
            weights=torch.tensor(weights),
            guide=Guide(tiny, null, w_gt=0.5, interval=(0.0, 1.0)) if guided else None,
            teacher=torch.cat([teacher[i] for i in images]),
        )

    together = run([0, 1, 2], [1, 1, 1])
    alone = [run([i], [1]) for i in range(3)]
    torch.testing.assert_close(together.raw, torch.cat([losses.raw for losses in alone]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.alignment, torch.cat([losses.alignment for losses in alone]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.loss, torch.stack([losses.loss for losses in alone]).sum(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(run([0, 1, 2], [1, 0, 1]).loss, alone[0].loss + alone[2].loss, rtol=1e-3, atol=1e-4)
    assert ((run([0, 1, 2], [1, 1, 1], guided=False).raw - together.raw).abs() > 1e-3).all()


def test_a_new_network_starts_with_a_gradient_of_ordinary_size() -> None:
    """Its output is zero, where the gradient of a cosine is as large as its epsilon is small."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(TINY)
    latents, noise = torch.randn(2, 4, 3, 8, 8)
    text = PackedText.from_features([torch.randn(2, 16) for _ in latents])
    objective = TransitionObjective(OT, patch_size=2, shift=None)

    def gradient() -> float:
        network.zero_grad()
        uniforms = torch.rand(4, 2, dtype=torch.float64)
        arguments = {"noise": list(noise), "kinds": torch.zeros(4, dtype=torch.int64), "uniforms": uniforms, "weights": torch.ones(4)}
        objective(network, list(latents), text, **arguments).loss.backward()
        return float(torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]))

    assert 0.1 < gradient() < 100 * len(latents)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    assert gradient() < 10 * len(latents)


@pytest.mark.parametrize("kind", ["ot_fm", "trigflow", "ve"])
def test_the_difference_tends_to_the_exact_derivative(tiny: TransitionTransformer, kind: str) -> None:
    tiny.double()
    generator = torch.Generator().manual_seed(2)
    latents, noise = ([torch.randn(3, h, w, generator=generator, dtype=torch.float64) for h, w in ((4, 6), (2, 2), (8, 4))] for _ in "xn")
    text = PackedText.from_features([torch.randn(m, 16, generator=generator, dtype=torch.float64) for m in (3, 1, 2)])
    transport = transports.make(kind)
    t, s, r = (transport.start * torch.tensor([share] * 3, dtype=torch.float64) for share in (0.6, 0.3, 0.1))
    r = torch.stack([r[0], t[1], s[2]])  # the second image has r = t
    packed, noise_tokens = PackedTokens.from_latents(latents, 2), PackedTokens.from_latents(noise, 2).tokens

    def run(derivative: str, epsilon: float = 0.005) -> torch.Tensor:
        objective = TransitionObjective(transport, patch_size=2, derivative=derivative, epsilon=epsilon)
        return objective.path_derivative(tiny, packed, noise_tokens, text, t=t, r=r)[0]

    exact, coarse, fine = run("jvp"), run("finite-difference"), run("finite-difference", 0.0005)
    assert not exact[packed.rows([1])].any()
    assert exact[packed.rows([0, 2])].abs().min() > 0
    assert float((coarse - exact).norm() / exact.norm()) < 5e-3
    assert float((fine - exact).norm() / exact.norm()) < 5e-5


def test_the_precision_of_the_derivative_is_a_setting(tiny: TransitionTransformer) -> None:
    latent, noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    text, t, r = PackedText.from_features([torch.ones(2, 16)]), torch.tensor([0.6]).double(), torch.tensor([0.2]).double()
    packed, noise_tokens = PackedTokens.from_latents([latent], 2), PackedTokens.from_latents([noise], 2).tokens

    def error(derivative: str, precision: str, epsilon: float | None = None) -> float:
        objective = TransitionObjective(OT, patch_size=2, derivative=derivative, derivative_precision=precision, epsilon=epsilon)
        with torch.autocast("cpu", torch.bfloat16):  # what the training step may run under changes nothing
            return float((objective.path_derivative(tiny, packed, noise_tokens, text, t=t, r=r)[0] - exact).norm() / exact.norm())

    exact = (
        TransitionObjective(OT, patch_size=2, derivative="jvp")
        .path_derivative(
            tiny.double(),
            packed._replace(tokens=packed.tokens.double()),
            noise_tokens.double(),
            text._replace(features=text.features.double()),
            t=t,
            r=r,
        )[0]
        .float()
    )
    tiny.float()
    assert error("jvp", "fp32") < 1e-4
    assert error("finite-difference", "fp32") < 0.05
    assert 1e-3 < error("jvp", "bf16") < 0.2
    assert error("finite-difference", "bf16", 0.005) > 0.3, "rounding noise, divided by the interval"
    assert error("finite-difference", "fp16") < min(0.1, error("finite-difference", "fp16", 0.005), error("finite-difference", "bf16"))


@pytest.mark.parametrize("other_rank", [False, True])
def test_a_derivative_that_overflows_in_float16_is_repeated_in_float32(tiny: TransitionTransformer, other_rank: bool) -> None:
    """On all ranks, if they must run equally many forwards."""
    latent, noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    text, t, r = PackedText.from_features([torch.ones(2, 16)]), torch.tensor([0.6]).double(), torch.tensor([0.2]).double()
    weights = torch.ones(1)
    asked: list[bool] = []

    def losses(precision: str, scale: float) -> Losses:
        def network(packed: PackedTokens, *inputs: Any) -> PackedTokens:
            out = tiny(packed, *inputs)
            return out._replace(tokens=out.tokens @ (scale * torch.eye(out.tokens.shape[1])))  # in the precision of autocast

        def agree(overflow: bool) -> bool:
            asked.append(overflow)
            return overflow or other_rank

        objective = TransitionObjective(OT, patch_size=2, derivative_precision=precision, epsilon=0.02, agree=agree)
        return objective.at_times(network, [latent], text, noise=[noise], t=t, r=r, weights=weights)

    half, single = losses("fp16", 1e7), losses("fp32", 1e7)
    assert (half.repeated, single.repeated, asked) == (True, False, [True])
    assert torch.equal(half.raw, single.raw)
    half, single = losses("fp16", 1.0), losses("fp32", 1.0)
    assert (half.repeated, asked) == (other_rank, [True, False])
    assert torch.equal(half.raw, single.raw) == other_rank
    assert half.raw.item() == pytest.approx(single.raw.item(), rel=1e-2)


def test_a_pack_without_transitions_evaluates_one_token_where_ranks_need_equal_forwards(tiny: TransitionTransformer) -> None:
    """ZeRO-3 needs as many forwards on every rank; it does not need them to be large."""
    seen: list[int] = []

    def counting(packed: PackedTokens, t: torch.Tensor, r: torch.Tensor, condition: Condition) -> PackedTokens:
        seen.append(len(packed.tokens))
        return tiny(packed, t, r, condition)

    latents, text = [torch.randn(3, 4, 4), torch.randn(3, 8, 8)], PackedText.from_features([torch.randn(2, 16)] * 2)
    t = torch.tensor([0.5, 0.2], dtype=torch.float64)
    for derivative, equal, expected in (("finite-difference", True, [2, 20]), ("finite-difference", False, [20]), ("jvp", True, [20])):
        seen.clear()
        objective = TransitionObjective(OT, patch_size=2, derivative=derivative, equal_forwards=equal)
        objective.at_times(counting, latents, text, noise=latents, t=t, r=t, weights=torch.ones(2))
        assert seen == expected


@pytest.mark.parametrize("kind", transports.TRANSPORTS)
def test_guidance_in_the_target_is_the_published_one(kind: str, golden: Path) -> None:
    case = {name.split(".")[1]: x for name, x in load_file(golden / "transports.safetensors").items() if name.startswith(f"{kind}.")}
    published = json.loads((golden / "meta.json").read_text())["transports"][kind]
    transport, t = transports.make(kind), case["t"].double()
    answers = torch.stack(PackedTokens.from_latents([*case["F_cond"], *case["F_uncond"]], 1).tokens.split(30))

    def says(packed: PackedTokens, t: torch.Tensor, r: torch.Tensor, condition: Condition) -> PackedTokens:
        assert isinstance(condition, torch.Tensor)
        assert torch.equal(t, r)
        return packed._replace(tokens=answers[condition].flatten(0, 1))

    interval = (published["w_start"] / transport.start, published["w_end"] / transport.start)
    guide = Guide(says, torch.arange(6, 12), w_gt=published["w_gt"], w_cond=published["w_cond"], interval=interval)
    noisy = PackedTokens.from_latents(list(case["x_t"]), 1)
    ideal = PackedTokens.from_latents(list(transport.ideal(case["x"], case["z"], t)), 1).tokens
    change = TransitionObjective(transport, patch_size=1, shift=None)._guidance(guide, noisy, ideal, torch.arange(6), t=t.flatten())
    expected = case["target_guided"] - case["target"]
    assert expected.any()
    torch.testing.assert_close(torch.stack(noisy._replace(tokens=change).to_latents()), expected, rtol=1e-4, atol=1e-5)


def test_users_mistakes_are_named(tiny: TransitionTransformer) -> None:
    objective = TransitionObjective(OT, patch_size=2)
    one = [torch.zeros(3, 4, 4)]
    with pytest.raises(ValueError, match=r"image 0: r = 0\.8000 is later than t = 0\.5000"):
        objective.at_times(
            tiny,
            one,
            PackedText.from_features([torch.zeros(1, 16)]),
            noise=one,
            t=torch.tensor([0.5]),
            r=torch.tensor([0.8]),
            weights=torch.ones(1),
        )
    with pytest.raises(ValueError, match="unknown weighting"):
        TransitionObjective(OT, patch_size=2, weighting="linear")
    with pytest.raises(ValueError, match="unknown derivative 'exact': choose one of finite-difference, jvp"):
        TransitionObjective(OT, patch_size=2, derivative="exact")
    with pytest.raises(ValueError, match="unknown derivative_precision 'fp8': choose one of fp32, bf16, fp16"):
        TransitionObjective(OT, patch_size=2, derivative_precision="fp8")
