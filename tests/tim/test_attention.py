from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tim.attention import attention, choose_backend
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
    "hundreds": ([1 + i % 23 for i in range(300)], [1 + i % 7 for i in range(300)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_a_dense_mask(name: str) -> None:
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


def test_backend_choice_and_its_errors() -> None:
    assert choose_backend("cpu", torch.float32) == "sdpa"
    assert choose_backend("cuda", torch.bfloat16) == "varlen"
    assert choose_backend("cuda", torch.float32) == "sdpa"
    x, segments = torch.zeros(2, 1, 4), Segments.from_lengths([2])
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        attention(x, x, x, segments, segments, backend="fast")
    with pytest.raises(ValueError, match="needs CUDA"):
        attention(x, x, x, segments, segments, backend="varlen")
