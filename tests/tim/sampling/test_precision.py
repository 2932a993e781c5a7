"""Sampling in half precision: what runs in it, what stays in float32, and how far the images are from those of float32."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim import Generator, PackedText, PackedTokens, TransitionTransformer, layers, sample, transports
from tim.attention.dispatch import attention
from tim.model_kinds import Dtype
from tim.packed import Condition
from tim.sampling.sampler import default_dtype

OT = transports.make("ot_fm")
NOISE = [torch.randn(3, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((8, 12), (16, 4))]
TEXT = PackedText.from_features([torch.randn(m, 16, generator=torch.Generator().manual_seed(m)) for m in (3, 2)])
NULL = PackedText.from_features([torch.zeros(1, 16)] * 2)


def record_dtypes(network: TransitionTransformer, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """Dtypes that pass through the network from now on, by what they are."""
    seen: dict[str, set[torch.dtype]] = defaultdict(set)

    def record(name: str, *values: Any) -> None:
        seen[name].update(value.dtype for value in values if isinstance(value, Tensor))

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        record("attention", q, k, v)
        return attention(q, k, v, *rest, **options)

    for kind in (layers.SelfAttention, layers.CrossAttention):
        monkeypatch.setattr(kind, "attend", staticmethod(attend))
    network.register_forward_pre_hook(lambda _, inputs: record("state and times", inputs[0].tokens, *inputs[1:3]))
    for module in network.modules():
        if isinstance(module, nn.Linear | layers.PatchEmbedding):
            module.register_forward_hook(lambda _, inputs, output: record("matrix products", output))
        elif isinstance(module, layers.ModulatedNorm | nn.LayerNorm):
            module.register_forward_hook(lambda _, inputs, output: record("norms", output))
        elif isinstance(module, layers.TimeEmbedding):
            module.mlp.register_forward_pre_hook(lambda _, inputs: record("sines of times", *inputs))
        elif isinstance(module, layers.Block):
            module.register_forward_pre_hook(lambda _, inputs: record("angles", inputs[-1]))
    return seen


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", None])
def test_matrix_products_are_in_the_dtype_and_the_rest_in_float32(
    tiny: TransitionTransformer, dtype: Dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype or "fp32", torch.float32)
    times: list[float] = []
    states: list[Tensor] = []
    seen = record_dtypes(tiny, monkeypatch)
    tiny.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[1][0])))
    settings = {"guidance": 2.0, "null_condition": NULL, "stochasticity": 0.2, "seeds": [0, 1]}
    with torch.autocast("cpu", torch.bfloat16):  # what it runs under changes nothing
        done = sample(tiny, NOISE, TEXT, transport=OT, steps=3, dtype=dtype, callback=lambda _, clean: states.extend(clean()), **settings)
    full = {key: {torch.float32} for key in ("state and times", "sines of times", "norms")}
    assert seen == {**full, "angles": {torch.complex64}, "matrix products": {low}, "attention": {low}}
    assert times == torch.tensor([1, 2 / 3, 1 / 3]).tolist(), "not rounded"
    assert {x.dtype for x in states} == {torch.float64}
    assert {x.dtype for x in done.latents} == {torch.float32}


def test_the_default_is_float16_on_a_gpu_alone() -> None:
    assert default_dtype(torch.device("cuda", 1)) == "fp16"
    assert default_dtype(torch.device("cpu")) == "fp32"
    assert Generator(tiny_network(), SPEC).dtype == "fp32"
    with pytest.raises(ValueError, match="unknown dtype 'half': choose one of fp32, bf16, fp16"):
        sample(tiny_network(), NOISE, TEXT, transport=OT, dtype="half")  # pyright: ignore[reportArgumentType]


def test_images_in_half_precision_are_close_to_those_in_float32() -> None:
    """Random weights: the figures for trained ones are in docs/sampling.md."""

    def levels(dtype: Dtype) -> np.ndarray:
        generator = Generator(tiny_network(), SPEC, dtype=dtype)
        images = generator(["a", "b", ""], height=[16, 8, 32], width=[16, 32, 8], guidance=2.0, seed=[1, 2, 3])
        return np.concatenate([np.asarray(image, dtype=int).ravel() for image in images])

    exact = levels("fp32")
    assert exact.std() > 50
    means: dict[str, float] = {}
    bounds: list[tuple[Dtype, float, int]] = [("fp16", 0.2, 2), ("bf16", 1.5, 12)]
    for dtype, mean, most in bounds:
        difference = np.abs(levels(dtype) - exact)
        assert difference.mean() < mean
        assert np.percentile(difference, 99) < most
        means[dtype] = float(difference.mean())
    assert 0 < 4 * means["fp16"] < means["bf16"]


def test_an_evaluation_that_overflows_in_float16_is_repeated_in_float32(
    tiny: TransitionTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    class Large:
        patch_size = 2
        scale = 1e7

        def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition) -> PackedTokens:
            out = tiny(packed, t, r, condition)
            identity = torch.eye(out.tokens.shape[1])
            return out._replace(tokens=((out.tokens @ (self.scale * identity)).float() / self.scale))

    network = Large()

    def drawn(dtype: Dtype) -> tuple[list[Tensor], list[str]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tim.sampling.sampler"):
            latents = sample(network, NOISE, TEXT, transport=OT, steps=2, dtype=dtype).latents
        return latents, caplog.messages

    (exact, silent), (half, messages) = drawn("fp32"), drawn("fp16")
    assert not silent
    assert messages == ["2 evaluations overflowed in fp16 and were repeated in fp32: sample this model in bf16 or fp32"]
    assert all(torch.equal(a, b) for a, b in zip(exact, half, strict=True))
    network.scale = 1.0
    (exact, _), (half, messages) = drawn("fp32"), drawn("fp16")
    assert not messages
    assert not torch.equal(exact[0], half[0])
