"""LoRA files in the key names of PEFT, ComfyUI, diffusers and kohya."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tim.tiny import tiny_network
from tim.pretrained.lora_files import merge_adapters, read_adapters

LAYERS = {"blocks.0.attn.qkv": (96, 32), "blocks.1.mlp.fc2": (32, 85)}
RANK, ALPHA = 2, 6.0
PARTS = {layer: (torch.randn(RANK, shape[1]), torch.randn(shape[0], RANK)) for layer, shape in LAYERS.items()}
STYLES = {  # layer, lora_A, lora_B
    "peft": ("base_model.model.{}", "lora_A.weight", "lora_B.weight"),
    "default": ("base_model.model.{}", "lora_A.default.weight", "lora_B.default.weight"),
    "comfyui": ("diffusion_model.{}", "lora_A.weight", "lora_B.weight"),
    "comfyui-up": ("diffusion_model.{}", "lora_up.weight", "lora_down.weight"),
    "diffusers": ("transformer.{}", "lora_A.weight", "lora_B.weight"),
    "plain": ("{}", "lora.down.weight", "lora.up.weight"),
    "kohya": ("lora_unet_{}", "lora_down.weight", "lora_up.weight"),
}


def tensors_of(style: str) -> dict[str, Tensor]:
    pattern, *ends = STYLES[style]
    if style == "comfyui-up":
        ends.reverse()
    result: dict[str, Tensor] = {}
    for layer, parts in PARTS.items():
        name = pattern.format(layer.replace(".", "_") if style == "kohya" else layer)
        result.update({f"{name}.{end}": part.clone() for end, part in zip(ends, parts, strict=True)})
        if style != "peft":
            result[f"{name}.alpha"] = torch.tensor(ALPHA)
    return result


def changes(source: Path, *, scale: float = 1.0) -> dict[str, Tensor]:
    """What merging a file changes in a network."""
    before, network = tiny_network(), tiny_network()
    merge_adapters(network, read_adapters(source), scale=scale, source=source)
    pairs = zip(before.named_parameters(), network.parameters(), strict=True)
    return {name: after.detach() - value.detach() for (name, value), after in pairs if not torch.equal(after, value)}


def check_changes(found: Mapping[str, Tensor], *, strength: float) -> None:
    assert set(found) == {f"{layer}.weight" for layer in LAYERS}
    for layer, (a, b) in PARTS.items():
        torch.testing.assert_close(found[f"{layer}.weight"], strength * (b @ a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_keys_is_merged(tmp_path: Path, style: str) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors_of(style), file)
    if style == "peft":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
        check_changes(changes(tmp_path), strength=ALPHA / RANK)
    check_changes(changes(file), strength=ALPHA / RANK)
    check_changes(changes(file, scale=-0.5), strength=-0.5 * ALPHA / RANK)


def test_alpha_is_the_rank_unless_something_says_otherwise(tmp_path: Path) -> None:
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(tensors_of("peft"), file)
    check_changes(changes(file), strength=1.0)
    config.write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "use_rslora": True}))
    check_changes(changes(file), strength=ALPHA / RANK**0.5)
    save_file(tensors_of("peft"), file, metadata={"lora_alpha": "4"})
    check_changes(changes(file), strength=4 / RANK)


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    a, b = PARTS["blocks.0.attn.qkv"]
    key = "base_model.model.blocks.0.attn.qkv"
    cases: dict[str, tuple[Any, str]] = {
        "layer": (
            {"blocks.9.attn.qkv.lora_A.weight": a, "blocks.9.attn.qkv.lora_B.weight": b},
            r"1 of its 1 layers .* blocks\.9\.attn\.qkv",
        ),
        "shape": ({"blocks.0.attn.proj.lora_A.weight": a, "blocks.0.attn.proj.lora_B.weight": b}, r"shape \(96, 32\), but .* \(32, 32\)"),
        "half": ({f"{key}.lora_A.weight": a}, r"blocks\.0\.attn\.qkv has only a of lora_A"),
        "ranks": ({f"{key}.lora_A.weight": a[:1].clone(), f"{key}.lora_B.weight": b}, r"lora_A \(1, 32\) and lora_B \(96, 2\)"),
        "dora": ({f"{key}.lora_magnitude_vector": a}, r"unknown key base_model\.model\.blocks\.0\.attn\.qkv\.lora_magnitude_vector"),
        "weights": ({"blocks.0.attn.qkv.weight": b}, r"unknown key blocks\.0\.attn\.qkv\.weight"),
        "empty": ({}, "has no tensors"),
    }
    network, before = tiny_network(), tiny_network().state_dict()
    for name, (tensors, problem) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        with pytest.raises(ValueError, match=problem) as refused:
            merge_adapters(network, read_adapters(file), source=file)
        assert str(refused.value).startswith(str(file))
        assert "\n" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    (tmp_path / "text.safetensors").write_text("x")
    for name, problem in (("text.safetensors", "not a safetensors file"), ("none", "no such LoRA file")):
        with pytest.raises(ValueError, match=problem):
            read_adapters(tmp_path / name)
    save_file(tensors_of("peft"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {"attn": 1}}))
    with pytest.raises(ValueError, match="alpha_pattern is not supported"):
        read_adapters(tmp_path)
