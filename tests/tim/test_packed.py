from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tim import PackedText, PackedTokens
from tim.packed import _PerToken, _sum_per_image

sides = st.integers(1, 6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 4))
def test_latents_survive_the_round_trip(sizes: list[tuple[int, int]], patch_size: int, channels: int) -> None:
    latents = [torch.randn(channels, h * patch_size, w * patch_size) for h, w in sizes]
    packed = PackedTokens.from_latents(latents, patch_size)
    assert packed.tokens.shape == (sum(h * w for h, w in sizes), patch_size**2 * channels)
    assert all(torch.equal(a, b) for a, b in zip(packed.to_latents(), latents, strict=True))


def test_positions_count_rows_and_columns_anew_in_every_image() -> None:
    packed = PackedTokens.from_latents([torch.zeros(1, 2, 3), torch.zeros(1, 1, 2)], 1)
    assert packed.positions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1]]
    assert packed.owner.tolist() == [0] * 6 + [1] * 2
    assert packed.segments.cu_seqlens.tolist() == [0, 6, 8]


def test_a_selection_is_the_pack_of_the_selected() -> None:
    latents = [torch.randn(2, h, w) for h, w in ((2, 4), (4, 2), (6, 6))]
    selected = PackedTokens.from_latents(latents, 2).select([2, 0, 2])
    expected = PackedTokens.from_latents([latents[2], latents[0], latents[2]], 2)
    for a, b in zip(selected, expected, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            assert torch.equal(a, b)
    assert selected.sizes == expected.sizes
    assert selected.segments.lengths == expected.segments.lengths


def test_mean_per_image() -> None:
    packed = PackedTokens.from_latents([torch.zeros(1, 1, 3), torch.zeros(1, 1, 1)], 1)
    assert packed.mean_per_image(torch.tensor([1.0, 2.0, 6.0, 5.0])).tolist() == [3.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_repeated_rows_are_sums_in_float32(dtype: torch.dtype) -> None:
    """As on a GPU, where those of `index_select` are sums in the dtype of the rows."""
    lengths = [700, 1, 4096]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rows = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    weights = (torch.randn(sum(lengths), 5) + 1).to(dtype)
    out = _PerToken.apply(rows, owner)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, rows.index_select(0, owner))
    (gradient,) = torch.autograd.grad(out, rows, weights)
    expected = torch.stack([part.double().sum(0) for part in weights.split(lengths)])
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-12 if dtype == torch.float64 else 2**-8, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert _sum_per_image(weights.float(), owner, images=3).dtype == torch.float32


def test_a_size_that_does_not_fit_the_patch_is_named() -> None:
    with pytest.raises(ValueError, match=r"latent 1 has shape \(3, 5, 4\).*multiples of 2"):
        PackedTokens.from_latents([torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)], 2)


def test_captions_of_any_length_and_none() -> None:
    text = PackedText.from_features([torch.ones(3, 4), torch.zeros(0, 4), torch.full((1, 4), 2.0)])
    assert text.segments.lengths == (3, 0, 1)
    assert text.select([2, 0]).features[0, 0] == 2
