"""The formulas against what torch counts while a network runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tim.attention.sdpa
from tests.tim.tiny import TINY, TINY_CLASSES
from tim import PackedText, PackedTokens, TransitionTransformer
from tim.flops import Lengths, activation_bytes, backward_flops, forward_flops, step_flops
from tim.packed import Condition

SIZES = [(8, 8), (4, 16), (24, 12), (2, 2)]
CAPTIONS = (3, 1, 5, 2)
NETWORKS = {
    "captions": TINY,
    "captions, projection": {**TINY, "z_dim": 12, "projector_dim": 20, "encoder_depth": 1},
    "classes": {**TINY_CLASSES, "distance_aware": False, "new_condition": "t,t-r"},
}


def pack(network: TransitionTransformer, scale: int = 1) -> tuple[PackedTokens, Tensor, Tensor, Condition]:
    t = torch.rand(len(SIZES))
    text = PackedText.from_features([torch.randn(m, 16) for m in CAPTIONS])
    condition = text if network.classes is None else torch.zeros(len(SIZES), dtype=torch.int64)
    return (
        PackedTokens.from_latents([torch.randn(network.channels, scale * h, scale * w) for h, w in SIZES], network.patch_size),
        t,
        t / 2,
        condition,
    )


def lengths(inputs: tuple[PackedTokens, Tensor, Tensor, Condition]) -> Lengths:
    return Lengths(inputs[0].segments.lengths, CAPTIONS if isinstance(inputs[3], PackedText) else None)


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tim.attention.sdpa, "PAIRS_PER_LAUNCH", 0)  # segments of different lengths in a batch compute masked pairs, too
    tim.attention.sdpa.batching.cache_clear()
    network = TransitionTransformer.from_official(NETWORKS[name])
    inputs = pack(network)
    alignment = network.projector is not None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:  # the fused kernels compute scores twice
        out: Any = network(*inputs, return_alignment=True) if alignment else network(*inputs)
    with FlopCounterMode(display=False) as backward:
        (out[0].tokens.sum() + out[1].sum() if alignment else out.tokens.sum()).backward()
    counted = forward.get_total_flops(), backward.get_total_flops()
    pack_lengths = lengths(inputs)
    assert forward_flops(network.params, pack_lengths, alignment=alignment) == counted[0]
    assert backward_flops(network.params, pack_lengths, alignment=alignment) == counted[1]
    derivative = 2 * forward_flops(network.params, pack_lengths.of([1, 3]))
    assert step_flops(network.params, pack_lengths, moving=[1, 3], alignment=alignment) == sum(counted) + derivative


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("params", [TINY, TINY_CLASSES], ids=["captions", "classes"])
def test_memory_is_what_autograd_keeps(params: dict[str, Any], every: int, precision: str) -> None:
    """Bytes of distinct storages that the blocks keep: within 15 %."""
    network = TransitionTransformer.from_official({**params, "depth": 6, "hidden_size": 64})
    network.configure_execution(checkpoint_every=every)
    inputs = pack(network, scale=6)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        out = network(*inputs)
    one, two = (activation_bytes({**network.params, "depth": depth}, lengths(inputs), precision=precision) for depth in (1, 2))
    expected = activation_bytes(network.params, lengths(inputs), precision=precision, checkpoint_every=every)
    expected -= two - one if every else 0  # the block that the backward pass computes again
    assert len(out.tokens)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)
