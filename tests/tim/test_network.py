from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tim.conftest import TINY
from tim import PackedText, PackedTokens, TransitionTransformer

SIZES = [(4, 4), (2, 8), (12, 4), (4, 4)]


def inputs(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(3, h, w, generator=generator) for h, w in SIZES]
    captions = [torch.randn(m, 16, generator=generator) for m in (3, 1, 5, 2)]
    return latents, captions, torch.tensor([0.9, 0.5, 0.3, 1.0]), torch.tensor([0.9, 0.1, 0.0, 0.4])


def test_a_pack_equals_its_images_in_output_and_gradient(tiny: TransitionTransformer) -> None:
    tiny.double()
    latents, captions, t, r = inputs()
    latents, captions = [x.double() for x in latents], [c.double() for c in captions]
    out = tiny(PackedTokens.from_latents(latents, 2), t.double(), r.double(), PackedText.from_features(captions)).to_latents()
    torch.cat([x.flatten() for x in out]).square().sum().backward()
    together = {name: p.grad.clone() for name, p in tiny.named_parameters() if p.grad is not None}
    tiny.zero_grad()
    for i, latent in enumerate(latents):
        only = slice(i, i + 1)
        text = PackedText.from_features(captions[only])
        alone = tiny(PackedTokens.from_latents([latent], 2), t[only].double(), r[only].double(), text)
        torch.testing.assert_close(alone.to_latents()[0], out[i], rtol=1e-5, atol=1e-6)
        alone.tokens.square().sum().backward()
    assert together.keys() == {name for name, _ in tiny.named_parameters()}
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-5, msg=name)


def test_forward_mode_derivative_equals_a_central_difference(tiny: TransitionTransformer) -> None:
    """Along any direction of tokens and times: what the objective needs of `torch.func.jvp`."""
    tiny.double()
    latents, captions, t, r = inputs()
    packed = PackedTokens.from_latents([x.double() for x in latents], 2)
    text = PackedText.from_features([c.double() for c in captions])
    point = (packed.tokens, t.double(), r.double())
    direction = tuple(torch.randn_like(x) for x in point)

    def run(tokens: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return tiny(packed._replace(tokens=tokens), t, r, text).tokens

    out, derivative, *_ = torch.func.jvp(run, point, direction)
    ahead, behind = (run(*(x + step * d for x, d in zip(point, direction, strict=True))) for step in (1e-5, -1e-5))
    torch.testing.assert_close(out, run(*point))
    torch.testing.assert_close(derivative, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


def test_every_input_matters(tiny: TransitionTransformer) -> None:
    latents, captions, t, r = inputs()

    def run(latents: list[Tensor], captions: list[Tensor], t: Tensor, r: Tensor) -> Tensor:
        return tiny(PackedTokens.from_latents(latents, 2), t, r, PackedText.from_features(captions)).tokens

    base = run(latents, captions, t, r)
    for changed in (
        run([-x for x in latents], captions, t, r),
        run(latents, [-c for c in captions], t, r),
        run(latents, captions, t / 2, r),
        run(latents, captions, t, r / 2),
        run([x.transpose(1, 2) for x in latents], captions, t, r),
    ):
        assert not torch.allclose(base, changed)


def test_a_new_network_says_zero_and_runs_under_autocast() -> None:
    network = TransitionTransformer.from_official(TINY)
    latents, captions, t, r = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(PackedTokens.from_latents(latents, 2), t, r, PackedText.from_features(captions))
    assert out.tokens.dtype == torch.float32
    assert not out.tokens.any()


def test_published_parameter_count() -> None:
    params = {"patch_size": 1, "in_channels": 32, "depth": 28, "hidden_size": 1152, "cap_feat_dim": 1152, "num_heads": 16}
    with torch.device("meta"):
        network = TransitionTransformer.from_official({**params, "lora_hidden_size": 384, "z_dim": 768, "encoder_depth": 8})
    assert sum(p.numel() for p in network.parameters()) == 873_109_408


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 3}, "unknown network parameter 'hidden'"),
        ({"depth": None}, "'depth' is missing"),
        ({"num_heads": 3}, "head width must be a multiple of 4"),
        ({"new_condition": "t,r"}, "only 't-r'"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionTransformer.from_official({**TINY, **change})


def test_weights_of_another_network_are_refused(tiny: TransitionTransformer) -> None:
    state = tiny.state_dict()
    other = TransitionTransformer.from_official({**TINY, "cap_feat_dim": 20, "depth": 1})
    with pytest.raises(ValueError, match=r"wrong shapes: y_embedder.*unexpected keys: blocks\.1"):
        other.load_official(state)
    with pytest.raises(ValueError, match=r"missing keys: x_embedder\.proj\.weight"):
        tiny.load_official({k: v for k, v in state.items() if k != "x_embedder.proj.weight"})
    with_projector = TransitionTransformer.from_official({**TINY, "z_dim": 8, "projector_dim": 8, "encoder_depth": 1})
    with_projector.load_official(state)
    tiny.load_official(with_projector.state_dict())


def test_unknown_rotary_layout() -> None:
    with pytest.raises(ValueError, match="unknown rotary layout 'xy': choose one of rowcol, centred, legacy"):
        TransitionTransformer.from_official(TINY, rope="xy")
