"""Loss masks in the objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tim import TransitionObjective, transports
from tim.objective import CONSISTENCY, DIFFUSION, TRANSITION, Losses
from tim.packed import PackedTokens

SIZES = [(8, 12), (4, 4), (16, 8)]
CHANNELS = 4


def inputs(seed: int = 0) -> dict:
    random = torch.Generator().manual_seed(seed)
    latents = [torch.randn(CHANNELS, *size, generator=random) for size in SIZES]
    return {
        "latents": latents,
        "noise": [torch.randn(latent.shape, generator=random) for latent in latents],
        "kinds": torch.tensor([DIFFUSION, CONSISTENCY, TRANSITION]),
        "uniforms": torch.rand(len(SIZES), 2, generator=random, dtype=torch.float64),
        "weights": torch.tensor([1.0, 0.5, 1.0]),
    }


def objective(patch_size: int = 2, **settings) -> TransitionObjective:
    return TransitionObjective(transports.make("ot_fm"), patch_size=patch_size, shift=None, **settings)


class Fixed:
    """A network whose output for the whole pack is a leaf, to read its gradient; zero for parts of the pack."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens.requires_grad_()

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: object) -> PackedTokens:
        return packed._replace(tokens=self.tokens if len(packed.tokens) == len(self.tokens) else torch.zeros_like(packed.tokens))


def evaluate(masks: list[Tensor] | None, *, patch_size: int = 2, **changes) -> tuple[Losses, list[Tensor]]:
    """Losses, and the gradient of the output as latents."""
    given = {**inputs(), **changes}
    packed = PackedTokens.from_latents(given["latents"], patch_size)
    network = Fixed(torch.randn(packed.tokens.shape, generator=torch.Generator().manual_seed(9)))
    condition = torch.zeros(len(SIZES), dtype=torch.int64)
    latents, rest = given["latents"], {name: value for name, value in given.items() if name != "latents"}
    losses = objective(patch_size)(network, latents, condition, masks=masks, **rest)
    losses.loss.backward()
    assert network.tokens.grad is not None
    return losses, packed._replace(tokens=network.tokens.grad).to_latents()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_mask_of_ones_is_no_mask_bit_by_bit(patch_size: int) -> None:
    found = []
    for masks in (None, [torch.ones(1, *size) for size in SIZES]):
        losses, gradients = evaluate(masks, patch_size=patch_size)
        found.append([losses.loss, losses.raw, losses.alignment, *gradients])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_cells_that_are_masked_out_have_no_gradient(patch_size: int) -> None:
    masks = [(torch.rand(1, *size, generator=torch.Generator().manual_seed(size[0])) > 0.4).float() for size in SIZES]
    _, gradients = evaluate(masks, patch_size=patch_size)
    for mask, gradient in zip(masks, gradients, strict=True):
        outside = (mask == 0).expand_as(gradient)
        assert (gradient[outside] == 0).all()
        assert (gradient[~outside] != 0).all()


def test_the_rest_of_an_image_counts_as_much_as_without_a_mask() -> None:
    """Not more: half an image has half the loss. The error that is shown is that of the trained part."""
    half = [torch.ones(1, *size) for size in SIZES]
    for mask in half:
        mask[:, : mask.shape[1] // 2] = 0
    losses, gradients = evaluate(half)
    whole, unmasked = evaluate(None)
    assert float(losses.loss.detach()) == pytest.approx(float(whole.loss.detach()) / 2, rel=1e-4)
    for number, (gradient, full) in enumerate(zip(gradients, unmasked, strict=True)):
        rows = slice(gradient.shape[1] // 2, None)
        scale = whole.raw[number] / losses.raw[number]  # the loss is relative to the error of the trained part
        assert torch.allclose(gradient[:, rows], full[:, rows] * scale, rtol=1e-3, atol=1e-8)
    dimmed, faint = evaluate([torch.full((1, *size), 0.25) for size in SIZES])
    assert float(dimmed.loss.detach()) == pytest.approx(float(whole.loss.detach()) / 4, rel=1e-5)
    assert torch.allclose(dimmed.raw, whole.raw)
    assert all(torch.allclose(one, other / 4, rtol=1e-4) for one, other in zip(faint, unmasked, strict=True))


def test_a_black_mask_is_an_image_without_loss() -> None:
    masks = [torch.ones(1, *SIZES[0]), torch.zeros(1, *SIZES[1]), torch.ones(1, *SIZES[2])]
    losses, gradients = evaluate(masks)
    assert torch.isfinite(losses.loss)
    assert losses.raw[1] == 0
    assert (gradients[1] == 0).all()


def test_the_distance_from_a_teacher_is_masked_too() -> None:
    given = inputs()
    packed = PackedTokens.from_latents(given["latents"], 2)
    projection = torch.randn(len(packed.tokens), 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = torch.randn(len(packed.tokens), 6, generator=torch.Generator().manual_seed(2))

    def network(packed: PackedTokens, t: Tensor, r: Tensor, condition: object, **options: bool) -> Any:
        out = packed._replace(tokens=packed.tokens * 0)
        return (out, projection) if options.get("return_alignment") else out

    latents = given.pop("latents")
    mask = torch.ones(1, *SIZES[0])
    mask[:, :, :6] = 0
    masks = [mask, torch.ones(1, *SIZES[1]), torch.ones(1, *SIZES[2])]
    losses = objective()(network, latents, torch.zeros(3, dtype=torch.int64), masks=masks, teacher=teacher, **given)
    losses.loss.backward()
    assert projection.grad is not None
    first = projection.grad[: SIZES[0][0] * SIZES[0][1] // 4].view(4, 6, 6)
    assert (first[:, :3] == 0).all()
    assert (first[:, 3:] != 0).any(-1).all()
