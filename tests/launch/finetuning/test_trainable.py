"""What `train.freeze` and `train.lora` train."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tim.attention.sdpa
from launch.config.load import load_config
from launch.config.schema import Config, ConfigError
from launch.engine.parameter_groups import parameter_groups, trained_parameters
from launch.finetuning.lora import draw_dropout
from launch.finetuning.trainable import limit_training, trained_share
from launch.training.checks import check_models
from tests.tim.tiny import TINY, tiny_network
from tim import PackedText, PackedTokens, TransitionTransformer
from tim.flops import Lengths, step_flops

PARAMS = {**TINY, "z_dim": 12, "projector_dim": 16, "encoder_depth": 1}
ALIGNMENT = "objective.alignment={kind: radio, path: none}"


def config_of(*overrides: str) -> Config:
    params = {**PARAMS, "in_channels": None}
    return load_config(None, overrides=[f"network.params={json.dumps(params)}", "train.steps=1", "corpus=none", ALIGNMENT, *overrides])


def limited(*overrides: str) -> TransitionTransformer:
    network = tiny_network(PARAMS).train()
    limit_training(network, config_of(*overrides))
    return network


def test_everything_is_trained_by_default() -> None:
    assert all(parameter.requires_grad for parameter in limited().parameters())


def test_patterns_freeze_parameters() -> None:
    network = limited("train.freeze=['blocks.*', 'x_embedder.proj.weight']")
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith("blocks.") or name == "x_embedder.proj.weight"}
    grouped = [
        parameter for group in parameter_groups(network, weight_decay=0.1, muon=True, lr_factors={}) for parameter in group["params"]
    ]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for _, parameter in trained_parameters(network)}
    with pytest.raises(ConfigError, match=r"train\.freeze: 'block\.\*' matches no parameter; names look like"):
        limited("train.freeze=['block.*']")
    with pytest.raises(ConfigError, match=r"train\.freeze: matches all parameters"):
        limited("train.freeze=['*']")


def test_adapters_are_trained_and_the_projection_of_an_alignment() -> None:
    network = limited("train.lora={rank: 2}")
    trained = dict(trained_parameters(network))
    adapted = {name.partition(".lora_")[0] for name in trained if ".lora_" in name}
    layers = [
        "attn.qkv",
        "attn.qkv_d",
        "attn.proj",
        *(f"cross_attn.{part}" for part in ("q", "kv", "proj")),
        "mlp.fc1_g",
        "mlp.fc1_x",
        "mlp.fc2",
    ]
    assert adapted == {f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers}
    assert {name for name in trained if ".lora_" not in name} == {
        name for name, _ in network.named_parameters() if name.startswith("projector.")
    }
    narrow = limited("train.lora={rank: 2, targets: [attn.qkv, 'final_layer.*']}")
    adapted = {name.partition(".lora_")[0] for name, _ in trained_parameters(narrow) if ".lora_" in name}
    expected = ["final_layer.linear", *(f"final_layer.adaLN_modulation.{part}" for part in ("fc1_g", "fc1_x", "fc2"))]
    assert adapted == {"blocks.0.attn.qkv", "blocks.1.attn.qkv", *expected}
    everywhere = {name for name, _ in trained_parameters(limited("train.lora={rank: 2, targets: ['*']}"))}
    assert {name for name in everywhere if name.startswith("projector.")} == {
        f"projector.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")
    }
    assert "x_embedder.proj.weight" not in everywhere
    with pytest.raises(ConfigError, match=r"train\.lora\.targets: 'projector\.\*' matches no linear layer"):
        limited("train.lora={targets: ['projector.*']}")
    with pytest.raises(ConfigError, match=r"train\.lora\.targets: 'qvk' matches no linear layer; names look like 'blocks\.0\.attn\.qkv'"):
        limited("train.lora={targets: [qvk]}")
    with pytest.raises(ConfigError, match=r"train\.freeze: train\.lora already freezes all weights"):
        config_of("train.lora={}", "train.freeze=['blocks.*']")
    with pytest.raises(ConfigError, match=r"train\.init: missing; train\.lora needs the weights"):
        check_models(config_of("train.lora={}"))


@pytest.mark.parametrize("limit", ["train.lora={rank: 2}", "train.freeze=['blocks.[0-3].*', 'y_embedder.*', 'x_embedder.*']"])
def test_frozen_weights_save_operations(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula against what torch counts in the forward and the backward pass."""
    monkeypatch.setattr(tim.attention.sdpa, "PAIRS_PER_LAUNCH", 0)  # as in tests/tim/test_flops.py
    tim.attention.sdpa.batching.cache_clear()
    params = {**TINY, "hidden_size": 128, "depth": 6}
    network = TransitionTransformer.from_official(params)
    sizes = {"network.params": json.dumps({**params, "in_channels": None}), "train.steps": 1, "corpus": "none"}
    limit_training(network, load_config(None, overrides=[*(f"{key}={value}" for key, value in sizes.items()), limit]))
    trained = trained_share((parameter.shape, parameter.requires_grad) for parameter in network.parameters())
    packed = PackedTokens.from_latents([torch.randn(3, 32, 48), torch.randn(3, 24, 24)], 2)
    text = PackedText.from_features([torch.randn(length, 16) for length in (7, 3)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(packed, torch.tensor([0.7, 0.2]), torch.tensor([0.2, 0.1]), text).tokens.sum().backward()
    lengths = Lengths(packed.segments.lengths, text.segments.lengths)
    expected = counter.get_total_flops()
    assert step_flops(network.params, lengths, moving=[], trained=trained) == pytest.approx(expected, rel=0.1)
    assert step_flops(network.params, lengths, moving=[]) > 1.15 * expected


def output(network: TransitionTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    packed = PackedTokens.from_latents([torch.randn(3, 4, 8, generator=generator)], 2)
    text = PackedText.from_features([torch.randn(3, 16, generator=generator)])
    return network(packed, torch.tensor([0.7]), torch.tensor([0.2]), text).tokens.detach()


def test_dropout_depends_on_seed_and_step_only() -> None:
    network = limited("train.lora={rank: 2, dropout: 0.5}")
    untouched = output(tiny_network(PARAMS))
    assert torch.equal(output(network), untouched)  # B is zero
    for name, parameter in trained_parameters(network):
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    outputs = {}
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        draw_dropout(network, seed=seed, step=step)
        torch.manual_seed(step)
        assert torch.equal(outputs.setdefault((seed, step), output(network)), output(network))
    assert not torch.equal(outputs[0, 1], outputs[0, 2])
    assert not torch.equal(outputs[0, 1], outputs[1, 1])
    masks = [module.get_buffer("kept") for name, module in network.named_modules() if name.endswith("lora_dropout.default")]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    kept = torch.cat(masks)
    assert set(kept.tolist()) == {0.0, 2.0}
    assert 0.3 < float((kept > 0).float().mean()) < 0.7
    assert not torch.equal(output(network.eval()), outputs[0, 1])
