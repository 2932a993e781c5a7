from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.tim.tiny import TINY, TINY_CLASSES
from tim import PackedText, PackedTokens, TransitionTransformer
from tim.network import NEW_CONDITIONS
from tim.packed import Condition, select
from tim.rope import rotations

SIZES = [(4, 4), (2, 8), (12, 4), (4, 4)]


def inputs(seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(3, h, w, generator=generator) for h, w in SIZES]
    captions = [torch.randn(m, 16, generator=generator) for m in (3, 1, 5, 2)]
    return latents, captions, torch.tensor([0.9, 0.5, 0.3, 1.0]), torch.tensor([0.9, 0.1, 0.0, 0.4])


def condition_of(network: TransitionTransformer, captions: list[Tensor], *, images: Sequence[int] = range(len(SIZES))) -> Condition:
    """Captions, or for a class model the classes 2, 0, 3 (none) and 1."""
    return PackedText.from_features([captions[i] for i in images]) if network.classes is None else torch.tensor([2, 0, 3, 1])[list(images)]


@pytest.fixture(params=["captions", "classes"])
def network(request: pytest.FixtureRequest, tiny: TransitionTransformer, tiny_classes: TransitionTransformer) -> TransitionTransformer:
    return tiny if request.param == "captions" else tiny_classes


def test_a_pack_equals_its_images_in_output_and_gradient(network: TransitionTransformer) -> None:
    network.double()
    latents, captions, t, r = inputs()
    latents, captions = [x.double() for x in latents], [c.double() for c in captions]
    out = network(PackedTokens.from_latents(latents, 2), t.double(), r.double(), condition_of(network, captions)).to_latents()
    torch.cat([x.flatten() for x in out]).square().sum().backward()
    together = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    for i, latent in enumerate(latents):
        only = slice(i, i + 1)
        condition = condition_of(network, captions, images=[i])
        alone = network(PackedTokens.from_latents([latent], 2), t[only].double(), r[only].double(), condition)
        torch.testing.assert_close(alone.to_latents()[0], out[i], rtol=1e-5, atol=1e-6)
        alone.tokens.square().sum().backward()
    assert together.keys() == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_gradient(tiny: TransitionTransformer, every: int) -> None:
    latents, captions, t, r = inputs()
    packed, text = PackedTokens.from_latents(latents, 2), PackedText.from_features(captions)

    def gradients() -> tuple[list[Tensor], int]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = tiny(packed, t, r, text).tokens
        return list(torch.autograd.grad(out.square().sum(), list(tiny.parameters()))), sum(kept)

    plain, plain_kept = gradients()
    tiny.configure_execution(checkpoint_every=every)
    again, kept = gradients()
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert kept < 0.9 * plain_kept


# Short: traced, differentiated and guarded as ever, but not compiled to C++, which takes a minute.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_blocks_compute_the_same_for_packs_of_any_size(
    tiny: TransitionTransformer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    latents, captions, t, r = inputs()
    compiled = copy.deepcopy(tiny)
    compiled.configure_execution(compile_for=96)  # a quarter has room for all
    torch.compiler.reset()
    graphs = []
    for images in (4, 2, 3):
        packed, text = PackedTokens.from_latents(latents[:images], 2), PackedText.from_features(captions[:images])
        out, expected = (network(packed, t[:images], r[:images], text).tokens for network in (compiled, tiny))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(packed, t[:images], r[:images], text).tokens, expected, rtol=1e-4, atol=1e-5)
        for network, result in ((compiled, out), (tiny, expected)):
            network.zero_grad()
            result.square().sum().backward()
        for actual, wanted in zip(compiled.parameters(), tiny.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-3, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1], "compiled again for a pack of another size"


def test_an_attention_that_cannot_run_is_an_error(tiny: TransitionTransformer) -> None:
    latents, captions, t, r = inputs()
    tiny.configure_execution(attention={torch.float32: "varlen"})
    with pytest.raises(ValueError, match="attention backend 'varlen' needs cuda, not cpu: use 'sdpa'"):
        tiny(PackedTokens.from_latents(latents, 2), t, r, PackedText.from_features(captions))


def test_every_input_matters(network: TransitionTransformer) -> None:
    latents, captions, t, r = inputs()

    def run(latents: list[Tensor], captions: list[Tensor], t: Tensor, r: Tensor) -> Tensor:
        return network(PackedTokens.from_latents(latents, 2), t, r, condition_of(network, captions)).tokens

    base = run(latents, captions, t, r)
    for changed in (
        run([-x for x in latents], captions, t, r),
        run(latents, captions, t / 2, r),
        run(latents, captions, t, r / 2),
        run([x.transpose(1, 2) for x in latents], captions, t, r),
    ):
        assert not torch.allclose(base, changed)
    packed, condition = PackedTokens.from_latents(latents, 2), condition_of(network, captions)
    for image in range(len(SIZES)):
        other = select(condition, [(i + 1) % len(SIZES) if i == image else i for i in range(len(SIZES))])
        changed = network(packed, t, r, other).to_latents()
        unchanged = [torch.allclose(x, y, atol=1e-6) for x, y in zip(changed, packed._replace(tokens=base).to_latents(), strict=True)]
        assert unchanged == [i != image for i in range(len(SIZES))]


@pytest.mark.parametrize("new_condition", NEW_CONDITIONS)
@pytest.mark.parametrize("use_new_embed", [True, False])
def test_the_interval_is_embedded_as_new_condition_says(new_condition: str, use_new_embed: bool) -> None:
    """The last of the times goes through the embedder of its own where there is one, the others through that of t."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official({**TINY, "new_condition": new_condition, "use_new_embed": use_new_embed})
    names = {name.split(".")[0] for name in network.state_dict()}
    assert ("delta_embedder" in names) == use_new_embed
    t, r = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
    first, last = network.t_embedder, network.delta_embedder or network.t_embedder
    expected = {
        "t-r": last(t - r),
        "r": last(r),
        "t,r": first(t) + last(r),
        "t,t-r": first(t) + last(t - r),
        "r,t-r": first(r) + last(t - r),
        "t,r,t-r": first(t) + first(r) + last(t - r),
    }
    seen: list[Tensor] = []
    block = network.blocks[0]
    block.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[1:3]))
    packed = PackedTokens.from_latents([torch.zeros(3, 4, 4)] * 2, 2)
    network(packed, t, r, PackedText.from_features([torch.zeros(1, 16)] * 2))
    torch.testing.assert_close(seen[1], expected[new_condition])
    torch.testing.assert_close(seen[0], first(t) + expected[new_condition])


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    params = {"patch_size": 2, "in_channels": 4, "depth": 2, "hidden_size": 128, "num_heads": 2, "z_dim": 16, "encoder_depth": 1}

    def xavier(weight: Tensor) -> float:
        return (2 / sum(weight.flatten(1).shape)) ** 0.5

    for kind in ({"cap_feat_dim": 96}, {"num_classes": 100}):
        for name, value in TransitionTransformer.from_official({**params, **kind}).state_dict().items():
            zero = name.endswith("bias") or name.startswith("final_layer.linear") or "adaLN_modulation.fc2" in name
            if "norm" in name or zero:
                assert torch.equal(value, torch.full_like(value, name.endswith("norm.weight"))), name
            else:
                normal = name.startswith(("t_embedder", "y_embedder"))
                assert float(value.std()) == pytest.approx(0.02 if normal else xavier(value), rel=0.05), name


def test_a_new_network_says_zero_and_runs_under_autocast() -> None:
    network = TransitionTransformer.from_official(TINY)
    latents, captions, t, r = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(PackedTokens.from_latents(latents, 2), t, r, PackedText.from_features(captions))
    assert out.tokens.dtype == torch.float32
    assert not out.tokens.any()


XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "encoder_depth": 8, "z_dim": 768, "lora_hidden_size": 384}
B = {"depth": 12, "hidden_size": 768, "num_heads": 12, "encoder_depth": 4, "z_dim": 768, "lora_hidden_size": 256}
CLASSES = {"num_classes": 1000, "class_dropout_prob": 0.1}


@pytest.mark.parametrize(
    ("params", "parameters", "keys"),
    [
        ({**XL, "patch_size": 1, "in_channels": 32, "cap_feat_dim": 1152}, 873_109_408, 900),
        ({**B, **CLASSES, "patch_size": 4, "in_channels": 4}, 136_173_120, 277),
        ({**XL, **CLASSES, "patch_size": 2, "in_channels": 4}, 672_259_344, 613),
        ({**XL, **CLASSES, "patch_size": 1, "in_channels": 32}, 672_296_224, 613),
    ],
    ids=["t2i-xl-1", "c2i-b-4-256", "c2i-xl-2-256", "c2i-xl-1-512"],
)
def test_published_parameter_counts(params: dict[str, int], parameters: int, keys: int) -> None:
    with torch.device("meta"):
        network = TransitionTransformer.from_official(params)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 3}, "unknown network parameter 'hidden'"),
        ({"depth": None}, "'depth' is missing"),
        ({"num_heads": 3}, "head width must be a multiple of 4"),
        ({"new_condition": "r-t"}, "new_condition 'r-t': choose one of t-r r t,r t,t-r"),
        ({"num_classes": 3}, "'num_classes' is for class models, cap_feat_dim for text models"),
        ({"cap_feat_dim": None, "num_classes": 0}, "num_classes and class_dropout_prob: must be at least 1"),
        ({"z_dim": 4}, "encoder_depth 8: must be from 1 to depth 2"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionTransformer.from_official({**TINY, **change})


def test_a_condition_of_another_network_is_refused(tiny: TransitionTransformer, tiny_classes: TransitionTransformer) -> None:
    packed, times, one = PackedTokens.from_latents([torch.zeros(3, 4, 4)] * 2, 2), torch.ones(2), torch.zeros(1, 16)
    refusals = [
        (tiny, torch.tensor([0, 1]), r"conditioned on captions \(PackedText\), not on Tensor"),
        (tiny, PackedText.from_features([one[:, :12]] * 2), "caption features have width 12, this network's cap_feat_dim is 16"),
        (tiny, PackedText.from_features([one]), "1 conditions for 2 images"),
        (tiny_classes, PackedText.from_features([one] * 2), "conditioned on class ids, from 0 to 2, or 3 for none, not on PackedText"),
        (tiny_classes, torch.tensor([0, 4]), "class 4: must be from 0 to 2, or 3 for none"),
        (tiny_classes, torch.tensor([-1, 0]), "class -1: must be from 0 to 2"),
        (tiny_classes, torch.tensor([0]), "1 conditions for 2 images"),
    ]
    for network, condition, message in refusals:
        with pytest.raises(ValueError, match=message):
            network(packed, times, times, condition)
    without_null = TransitionTransformer.from_official({**TINY_CLASSES, "class_dropout_prob": 0.0})
    assert len(without_null.state_dict()["y_embedder.embedding_table.weight"]) == 3
    with pytest.raises(ValueError, match=r"class 3: must be from 0 to 2$"):
        without_null(packed, times, times, torch.tensor([0, 3]))


def test_weights_of_another_network_are_refused(tiny: TransitionTransformer, tiny_classes: TransitionTransformer) -> None:
    state = tiny.state_dict()
    other = TransitionTransformer.from_official({**TINY, "cap_feat_dim": 20, "depth": 1})
    with pytest.raises(ValueError, match=r"wrong shapes: y_embedder.*unexpected keys: blocks\.1"):
        other.load_official(state)
    with pytest.raises(ValueError, match=r"missing keys: x_embedder\.proj\.weight"):
        tiny.load_official({k: v for k, v in state.items() if k != "x_embedder.proj.weight"})
    with pytest.raises(ValueError, match=r"blocks\.0\.adaLN_modulation\.fc2.*missing keys: y_embedder\.embedding_table\.weight"):
        tiny_classes.load_official(state)
    with_projector = TransitionTransformer.from_official({**TINY, "z_dim": 8, "projector_dim": 8, "encoder_depth": 1})
    with_projector.load_official(state)
    tiny.load_official(with_projector.state_dict())


@pytest.mark.parametrize("rope", ["rowcol", "legacy", "centred"])
def test_no_size_is_too_large(tiny_classes: TransitionTransformer, rope: str) -> None:
    """The published table of positions ends at 1024; here a thin image is 3000 patches long, and its turns are the formula's."""
    packed = PackedTokens.from_latents([torch.randn(3, 2, 6000), torch.randn(3, 4, 2)], 2)
    tiny_classes.rope = rope
    assert torch.isfinite(tiny_classes(packed, torch.ones(2), torch.zeros(2), torch.tensor([0, 1])).tokens).all()
    turns = rotations(packed, head_dim=16, layout=rope)[2999, 0].to(torch.complex128)
    first, second = {"rowcol": (2999, 0), "centred": (1499.5, 0), "legacy": (0, 2999)}[rope]
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.cat([first * frequencies, second * frequencies])
    torch.testing.assert_close(turns, torch.polar(torch.ones_like(angles), angles), rtol=0, atol=1e-3)


def test_unknown_rotary_layout() -> None:
    with pytest.raises(ValueError, match="unknown rotary layout 'xy': choose one of rowcol, centred, legacy"):
        TransitionTransformer.from_official(TINY, rope="xy")
