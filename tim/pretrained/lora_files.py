"""LoRA files (arXiv 2106.09685): read them in the key names of PEFT, ComfyUI, diffusers and kohya, and merge them into a network.

    base_model.model.blocks.0.attn.qkv.lora_A.weight                        PEFT; alpha in adapter_config.json
    diffusion_model.blocks.0.attn.qkv.lora_A.weight, ….alpha                ComfyUI, diffusers (transformer.…)
    lora_unet_blocks_0_attn_qkv.lora_down.weight, ….alpha                   kohya

Legend: M outputs and N inputs of a linear layer, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX, COMFYUI_PREFIX, KOHYA_PREFIX = "base_model.model.", "diffusion_model.", "lora_unet_"
ALPHA, RANK = "lora_alpha", "r"  # keys of PEFT's config, and of the metadata of our files
_PREFIXES = (PEFT_PREFIX, COMFYUI_PREFIX, "transformer.", KOHYA_PREFIX)
_ENDS = {"lora_A": "a", "lora_down": "a", "lora.down": "a", "lora_B": "b", "lora_up": "b", "lora.up": "b"}
_KEY = re.compile(rf"(?P<layer>.+)\.(?P<end>{'|'.join(map(re.escape, _ENDS))})(\.default)?(\.weight)?")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapter of a linear layer: a (R, N), b (M, R)."""

    a: Tensor
    b: Tensor
    alpha: float

    def change(self) -> Tensor:
        """What the adapter adds to the layer's matrix, (M, N) in float32: alpha/R · b a."""
        return (self.alpha / len(self.a)) * (self.b.float() @ self.a.float())


def read_adapters(path: str | Path) -> dict[str, Adapter]:
    """The adapters of a file, or of a folder that PEFT wrote, by layer. kohya's layer names have `_` for `.`.

    Without alpha (in the file, its metadata, or adapter_config.json beside it) the rank counts. Raises ValueError naming the file if it
    is missing or damaged, or has other keys.
    """
    path = Path(path)
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such LoRA file; give a .safetensors file, or a folder with {PEFT_WEIGHTS}")
    try:
        with safe_open(file, framework="pt") as content:
            tensors, metadata = {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, part = _parsed(key, file=file)
        parts.setdefault(layer, {})[part] = tensor
    if not parts:
        raise ValueError(f"{file}: has no tensors")
    strength = _strength(file, metadata)
    return {layer: _adapter(layer, found, strength=strength, file=file) for layer, found in parts.items()}


@torch.no_grad()
def merge_adapters(network: nn.Module, adapters: Mapping[str, Adapter], *, scale: float = 1.0, source: str | Path) -> None:
    """Add adapters, times `scale`, to the matrices of a network, in place. source: for messages.

    Raises ValueError naming a layer that the network does not have, or a wrong shape; then nothing is changed.
    """
    weights = {name.removesuffix(".weight"): weight for name, weight in network.named_parameters() if name.endswith(".weight")}
    flat = {name.replace(".", "_"): name for name in weights}
    targets = {layer: layer if layer in weights else flat.get(layer) for layer in adapters}
    missing = [layer for layer, target in targets.items() if target is None]
    if missing:
        raise ValueError(f"{source}: {len(missing)} of its {len(adapters)} layers are not in this network, for example {missing[0]}")
    found = [(weights[target], layer, adapters[layer]) for layer, target in targets.items() if target is not None]
    for weight, layer, adapter in found:
        shape = len(adapter.b), adapter.a.shape[1]
        if shape != tuple(weight.shape):
            raise ValueError(f"{source}: {layer} is for a matrix of shape {shape}, but the network's is {tuple(weight.shape)}")
    for weight, _, adapter in found:
        weight.add_(adapter.change().to(weight.device), alpha=scale)


def _parsed(key: str, *, file: Path) -> tuple[str, str]:
    """Layer of a key, and `a`, `b` or `alpha`."""
    name = key
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), "alpha"
    match = _KEY.fullmatch(name)
    if match is None:
        raise ValueError(f"{file}: unknown key {key}: LoRA files have lora_A and lora_B, or lora_down and lora_up (no DoRA, no LoHa)")
    return match["layer"], _ENDS[match["end"]]


def _adapter(layer: str, found: Mapping[str, Tensor], *, strength: float | None, file: Path) -> Adapter:
    if not {"a", "b"} <= found.keys():
        raise ValueError(f"{file}: {layer} has only {', '.join(sorted(found))} of lora_A (lora_down) and lora_B (lora_up)")
    a, b = found["a"], found["b"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise ValueError(f"{file}: {layer}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together")
    alpha = float(found["alpha"]) if "alpha" in found else len(a) if strength is None else strength
    return Adapter(a, b, float(alpha))


def _strength(file: Path, metadata: Mapping[str, str]) -> float | None:
    """alpha of all layers: of the file's metadata, else of PEFT's config beside it; None if there is none."""
    described = file.with_name(PEFT_CONFIG)
    if ALPHA in metadata:
        return float(metadata[ALPHA])
    if not described.is_file() or file.name != PEFT_WEIGHTS:
        return None
    try:
        config: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
        if unsupported := _unsupported(config, ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias")):
            raise ValueError(f"{described}: {unsupported[0]} is not supported")
        rank, alpha = config[RANK], float(config[ALPHA])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{described}: not a LoRA config of PEFT ({type(error).__name__}: {error})") from error
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _unsupported(config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if config.get(key)]
