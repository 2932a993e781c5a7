"""Packs of static shape: padding changes no result, and blocks are compiled once for all packs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.tim.tiny import TINY, TINY_CLASSES, tiny_network
from tim import PackedText, PackedTokens, TransitionObjective, TransitionTransformer, transports
from tim.attention.dispatch import BACKENDS, choose_backend
from tim.objective import Network
from tim.packed import Condition, PackShape, pad
from tim.rope import LAYOUTS

FULL = 64  # tokens of a full pack
Grid = tuple[int, int]


@pytest.fixture(scope="module", params=["captions", "classes"])
def network(request: pytest.FixtureRequest) -> TransitionTransformer:
    return tiny_network(TINY if request.param == "captions" else TINY_CLASSES)


@pytest.fixture
def count_graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Makes torch.compile count its graphs instead of generating code. A block that is not one graph is an error."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    torch.compiler.reset()
    return counter


def pack_of(grids: Sequence[Grid], network: TransitionTransformer, *, seed: int = 0) -> tuple[list[Tensor], Condition, dict[str, Any]]:
    """Latents, condition, and what the objective needs besides. Some captions are empty."""
    generator = torch.Generator().manual_seed(seed)
    dtype, images = network.final_layer.linear.weight.dtype, len(grids)
    latents, noise = ([torch.randn(3, 2 * h, 2 * w, generator=generator, dtype=dtype) for h, w in grids] for _ in range(2))
    if network.classes is None:
        lengths = torch.randint(0, 5, (images,), generator=generator).tolist()
        condition = PackedText.from_features([torch.randn(n, 16, generator=generator, dtype=dtype) for n in lengths])
    else:
        condition = torch.randint(0, 4, (images,), generator=generator)
    kinds, uniforms = torch.arange(images) % 3, torch.rand(images, 2, generator=generator, dtype=torch.float64)
    return latents, condition, {"noise": noise, "kinds": kinds, "uniforms": uniforms, "weights": torch.ones(images)}


def random_grids(generator: np.random.Generator) -> list[Grid]:
    """Images that fill a pack partly or wholly."""
    grids: list[Grid] = []
    while sum(h * w for h, w in grids) < FULL * generator.uniform(0.3, 1) and len(grids) < 14:
        room = FULL - sum(h * w for h, w in grids)
        height = int(generator.integers(1, min(8, room) + 1))
        grids.append((height, int(generator.integers(1, min(8, room // height) + 1))))
    return grids


def gradients(
    network: TransitionTransformer, pack: tuple[list[Tensor], Condition, dict[str, Any]], *, run: Network | None = None, derivative: str
) -> tuple[Tensor, list[Tensor]]:
    """Loss of each image, and the gradient of every parameter."""
    latents, condition, rest = pack
    objective = TransitionObjective(transports.make("ot_fm"), patch_size=2, derivative=derivative)
    losses = objective(run or network, latents, condition, **rest)
    return losses.raw, list(torch.autograd.grad(losses.loss, list(network.parameters()), materialize_grads=True))  # without captions


EDGES = {"full": [(8, 8)], "full of many": [(4, 4)] * 4, "one image": [(3, 2)], "one token": [(1, 1)], "many images": [(1, 1)] * 20}


@settings(max_examples=8, deadline=None)
@given(
    grids=st.one_of(
        st.sampled_from(list(EDGES.values())), st.integers(0, 10**6).map(lambda seed: random_grids(np.random.default_rng(seed)))
    ),
    derivative=st.sampled_from(["finite-difference", "jvp"]),
    rope=st.sampled_from(LAYOUTS),
)
def test_padding_changes_no_loss_and_no_gradient(network: TransitionTransformer, grids: list[Grid], derivative: str, rope: str) -> None:
    exact = copy.deepcopy(network).double()
    exact.rope = rope

    def padded(packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition) -> PackedTokens:
        shape = PackShape.around(packed, condition, full=FULL, whole=True)
        bigger, condition = pad(packed, condition, shape)
        assert (len(bigger.tokens), len(bigger.sizes)) == (shape.tokens, shape.images)
        t, r = (torch.cat([times, times.new_zeros(shape.images - len(times))]) for times in (t, r))
        return packed._replace(tokens=exact(bigger, t, r, condition).tokens[: len(packed.tokens)])

    pack = pack_of(grids, exact)
    loss, gradient = gradients(exact, pack, derivative=derivative)
    actual, of_padded = gradients(exact, pack, run=padded, derivative=derivative)
    torch.testing.assert_close(actual, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(of_padded, gradient, rtol=1e-7, atol=1e-9)


def test_shapes_are_few() -> None:
    def shape(tokens: int, images: int, text: int, *, whole: bool) -> tuple[int, int, int]:
        packed = PackedTokens.from_latents([torch.zeros(1, 1, 1)] * (images - 1) + [torch.zeros(1, 1, tokens - images + 1)], 1)
        return PackShape.around(packed, PackedText.from_features([torch.zeros(text, 4)]), full=4096, whole=whole)

    assert shape(1, 1, 1, whole=True) == shape(4096, 15, 511, whole=True) == (4096, 16, 512)
    assert shape(4097, 16, 512, whole=True) == (8192, 32, 1024)
    assert [shape(tokens, 1, 1, whole=False)[0] for tokens in (1, 1024, 1025, 5000)] == [1024, 1024, 2048, 5120]


def test_blocks_compile_once_for_200_packs(count_graphs: CompileCounter) -> None:
    network = tiny_network()
    compiled = copy.deepcopy(network)
    compiled.configure_execution(compile_for=FULL)
    generator = np.random.default_rng(0)
    for seed in range(200):
        latents, condition, rest = pack_of(random_grids(generator), network, seed=seed)
        packed, (t, r) = PackedTokens.from_latents(latents, 2), rest["uniforms"].float().sort(descending=True).values.unbind(1)
        out = compiled(packed, t, r, condition).tokens
        if seed % 40 == 0:
            expected = network(packed, t, r, condition).tokens
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            actual, wanted = (
                torch.autograd.grad(y.square().sum(), list(n.parameters())) for y, n in ((out, compiled), (expected, network))
            )
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
    assert count_graphs.frame_count == 1  # one graph, for both blocks


def test_the_objective_of_a_compiled_network(count_graphs: CompileCounter) -> None:
    """Without gradient, packs are padded to quarters; a forward-mode derivative is not compiled."""
    network = tiny_network(TINY_CLASSES)
    compiled = copy.deepcopy(network)
    compiled.configure_execution(compile_for=FULL, checkpoint_every=2)
    for derivative, graphs in (("jvp", 1), ("finite-difference", 2)):
        for seed, grids in enumerate(([(4, 4), (2, 3), (2, 2)], [(4, 4), (2, 2), (2, 4), (4, 4)])):
            pack = pack_of(grids, network, seed=seed)
            torch.testing.assert_close(
                gradients(compiled, pack, derivative=derivative), gradients(network, pack, derivative=derivative), rtol=1e-3, atol=1e-4
            )
        assert count_graphs.frame_count == graphs


def test_varlen_attention_is_a_part_of_the_compiled_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced only: the kernel needs a GPU."""
    graphs: list[torch.fx.GraphModule] = []

    class Traced(Exception):
        pass

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*_: Tensor) -> None:
            raise Traced

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    varlen = BACKENDS["varlen"]._replace(devices=("cpu",), backward=("cpu",))
    monkeypatch.setitem(BACKENDS, "varlen", varlen)
    choose_backend.cache_clear()
    torch.compiler.reset()
    compiled = tiny_network()
    compiled.configure_execution(compile_for=FULL, attention={torch.bfloat16: "varlen"})
    latents, condition, rest = pack_of([(4, 4), (2, 3)], compiled)
    t, r = rest["uniforms"].float().sort(descending=True).values.unbind(1)
    with pytest.raises(Traced), torch.autocast("cpu", torch.bfloat16):
        compiled(PackedTokens.from_latents(latents, 2), t, r, condition)
    choose_backend.cache_clear()
    assert sum("varlen" in str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function") == 2


def test_attention_that_cannot_be_traced_runs_between_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["sdpa"])  # which has a backward pass here
    choose_backend.cache_clear()
    torch.compiler.reset()
    network = tiny_network()
    compiled = copy.deepcopy(network)
    compiled.configure_execution(compile_for=FULL, attention={torch.float32: "flex"})
    counts = []
    for seed, grids in enumerate(([(6, 6), (3, 8)], [(8, 8)])):
        pack = pack_of(grids, network, seed=seed)
        actual, wanted = (gradients(each, pack, derivative="jvp") for each in (compiled, network))
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
        counts.append(counter.frame_count)
    choose_backend.cache_clear()
    assert counts[0] == counts[-1] > 1
