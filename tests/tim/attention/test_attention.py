from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tim.attention.dispatch import BACKENDS, AttentionRequirements, attention, choose_backend
from tim.attention.flex import _block_mask
from tim.attention.traced import sdpa_traced
from tim.packed import Segments


def dense(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], kv_lengths: list[int]) -> Tensor:
    """Masked attention over the whole pack in float64, zeros where a segment has no keys."""
    owner_q = torch.repeat_interleave(torch.arange(len(q_lengths)), torch.tensor(q_lengths))
    owner_k = torch.repeat_interleave(torch.arange(len(kv_lengths)), torch.tensor(kv_lengths))
    allowed = owner_q[:, None] == owner_k
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -1e9).softmax(-1) * allowed
    return torch.einsum("hts,shd->thd", weights, v)


CASES = {
    "one token each": ([1, 1, 1], [1, 1, 1]),
    "one giant": ([700], [9]),
    "giant beside one token": ([400, 1, 3], [5, 1, 7]),
    "empty text": ([4, 9, 2], [0, 3, 0]),
    "alike, in any order": ([40, 40, 6, 40, 6], [3, 3, 9, 3, 9]),
    "long ones side by side": ([300, 260, 300], [6, 5, 11]),
    "empty images": ([0, 40, 0, 3, 0], [2, 3, 0, 5, 0]),
    "hundreds": ([1 + i % 23 for i in range(300)], [1 + i % 7 for i in range(300)]),
}


def traced(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments) -> Tensor:
    """Attention as compiled blocks call it: without lengths as values."""
    return sdpa_traced(q, k, v, q_segments.ends, kv_segments.ends)


@pytest.mark.parametrize("attention", [attention, traced])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_a_dense_mask(name: str, attention: Callable[..., Tensor]) -> None:
    q_lengths, kv_lengths = CASES[name]
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), 2, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(kv_lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, Segments.from_lengths(q_lengths), Segments.from_lengths(kv_lengths))
    expected = dense(q, k, v, q_lengths, kv_lengths)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for actual, reference in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_derivative_equals_that_of_a_dense_mask(name: str) -> None:
    q_lengths, kv_lengths = CASES[name]
    torch.manual_seed(0)
    q, q_tangent = torch.randn(2, sum(q_lengths), 2, 8, dtype=torch.float64)
    k, k_tangent, v, v_tangent = torch.randn(4, sum(kv_lengths), 2, 8, dtype=torch.float64)
    q_segments, kv_segments = Segments.from_lengths(q_lengths), Segments.from_lengths(kv_lengths)
    primals, tangents = (q, k, v), (q_tangent, k_tangent, v_tangent)
    actual = torch.func.jvp(lambda q, k, v: attention(q, k, v, q_segments, kv_segments), primals, tangents)
    expected = torch.func.jvp(lambda q, k, v: dense(q, k, v, q_lengths, kv_lengths), primals, tangents)
    torch.testing.assert_close(actual, expected)


def test_a_pack_without_any_key_gives_zeros() -> None:
    q, none = torch.randn(7, 2, 4), torch.zeros(0, 2, 4)
    assert not attention(q, none, none, Segments.from_lengths([3, 4]), Segments.from_lengths([0, 0])).any()


@pytest.mark.parametrize("name", CASES)
def test_flex_skips_blocks_and_equals_a_dense_mask(name: str) -> None:
    """Forward on the CPU, where FlexAttention has no backward pass; several blocks of 128 in the larger cases."""
    q_lengths, kv_lengths = CASES[name]
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), 2, 8, dtype=torch.float64)
    k, v = torch.randn(2, sum(kv_lengths), 2, 8, dtype=torch.float64)
    out = attention(q, k, v, Segments.from_lengths(q_lengths), Segments.from_lengths(kv_lengths), backend="flex")
    torch.testing.assert_close(out, dense(q, k, v, q_lengths, kv_lengths))
    mask = _block_mask(tuple(q_lengths), tuple(kv_lengths), q.device)
    owner_q, owner_k = (torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (q_lengths, kv_lengths))
    expected = create_block_mask(lambda b, h, i, j: owner_q[i] == owner_k[j], None, None, len(owner_q), len(owner_k), device="cpu")
    torch.testing.assert_close(mask.to_dense(), expected.to_dense())
    torch.testing.assert_close(mask.full_kv_num_blocks, expected.full_kv_num_blocks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_backend_equals_a_dense_mask_on_the_gpu(name: str, backend: str) -> None:
    if backend == "flash" and not (find_spec("flash_attn") or find_spec("flash_attn_interface")):
        pytest.skip("needs flash-attn")
    q_lengths, kv_lengths = CASES[name]
    dtype = torch.float32 if BACKENDS[backend].dtypes is None else torch.bfloat16
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), 2, 64, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sum(kv_lengths), 2, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    weights = torch.randn_like(q)
    out = attention(q, k, v, Segments.from_lengths(q_lengths, "cuda"), Segments.from_lengths(kv_lengths, "cuda"), backend=backend)
    reference = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = dense(reference[0], reference[1], reference[2], q_lengths, kv_lengths)
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected_gradients = torch.autograd.grad((expected * weights.cpu()).sum(), reference)
    for actual, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert float((actual.cpu() - wanted).norm() / wanted.norm()) < (1e-3 if dtype == torch.float32 else 2e-2)


def test_auto_takes_the_fastest_that_can() -> None:
    half, full = torch.bfloat16, torch.float32
    assert choose_backend(AttentionRequirements("cpu", full, backward=True)) == "sdpa"
    assert choose_backend(AttentionRequirements("cuda", half, backward=True, capability=(8, 0))) == "varlen"
    assert choose_backend(AttentionRequirements("cuda", half, capability=(7, 5))) == "sdpa"
    assert choose_backend(AttentionRequirements("cuda", half, forward_mode=True)) == "sdpa"
    assert choose_backend(AttentionRequirements("cuda", full)) == "sdpa"


def test_an_impossible_choice_says_why_and_what_can() -> None:
    x, segments = torch.zeros(2, 1, 4), Segments.from_lengths([2])
    with pytest.raises(ValueError, match="unknown attention backend 'fast': choose one of auto, varlen, flash, flex, sdpa"):
        attention(x, x, x, segments, segments, backend="fast")
    with pytest.raises(ValueError, match="'varlen' needs cuda, not cpu: use 'sdpa'"):
        attention(x, x, x, segments, segments, backend="varlen")
    with pytest.raises(ValueError, match="'flex' has no backward pass on cpu: use 'sdpa'"):
        attention(x.requires_grad_(), x, x, segments, segments, backend="flex")
    with pytest.raises(ValueError, match="'varlen' has no forward-mode derivative: use 'sdpa'"):
        choose_backend(AttentionRequirements("cuda", torch.bfloat16, forward_mode=True), "varlen")
    with pytest.raises(ValueError, match=r"'flash' needs a GPU of compute capability 8\.0, not 7\.5: use 'sdpa'"):
        choose_backend(AttentionRequirements("cuda", torch.float16, capability=(7, 5)), "flash")
    with pytest.raises(ValueError, match=r"'varlen' needs torch\.bfloat16 or torch\.float16, not torch\.float32: use 'sdpa'"):
        choose_backend(AttentionRequirements("cuda", torch.float32), "varlen")
