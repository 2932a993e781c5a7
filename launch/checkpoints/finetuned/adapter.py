"""Export the adapters of a LoRA run as files of their own.

adapter_model.safetensors, adapter_config.json    for PEFT: `PeftModel.from_pretrained(network, FOLDER)`
comfyui.safetensors                               for ComfyUI: diffusion_model.….lora_A.weight, lora_B.weight and alpha
README.md                                         what it was trained on
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoints.averages import kind_of
from launch.checkpoints.checkpoint import Checkpoint
from launch.checkpoints.finetuned.base import FrozenBase, recorded_base
from launch.checkpoints.finetuned.merge import adapters_of
from tim.model_folder.replacing import replaced_folder
from tim.pretrained.lora_files import ALPHA, COMFYUI_PREFIX, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, RANK, Adapter
from tim.pretrained.safetensors_files import LazyTensors, write_file

COMFYUI_WEIGHTS = "comfyui.safetensors"


def adapters(run: Path, found: Checkpoint, *, ema: bool | float) -> tuple[dict[str, Adapter], FrozenBase]:
    """The adapters of a checkpoint, and the frozen weights they belong to. Raises ValueError if the run has none."""
    base = recorded_base(found.folder)
    if base is None or base.lora is None:
        raise ValueError(f"{run}: was trained without train.lora, it has no adapters: leave out --adapter")
    return adapters_of(found.pieces(kind_of(found.folder, ema)), base=base), base


def write_adapters(out: Path, found: Mapping[str, Adapter], base: FrozenBase, *, dtype: torch.dtype, step: int, card: str) -> None:
    """Write the folder atomically, replacing an older one. Raises ValueError if `out` is something else."""
    check_adapter_folder(out)
    rank, alpha = _settings(base)
    metadata = {"format": "pt", RANK: str(rank), ALPHA: f"{alpha:.9g}", "base_sha256": base.digest, "step": str(step)}
    peft: dict[str, Tensor] = {}
    comfyui: dict[str, Tensor] = {}
    for layer, adapter in found.items():
        for name, value in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            peft[f"{PEFT_PREFIX}{layer}.{name}.weight"] = value.to(dtype)
            comfyui[f"{COMFYUI_PREFIX}{layer}.{name}.weight"] = value.to(dtype)
        comfyui[f"{COMFYUI_PREFIX}{layer}.alpha"] = torch.tensor(alpha)
    config = peft_config(list(found), rank=rank, alpha=alpha, source=base.source)
    with replaced_folder(out) as partial:
        write_file(partial / PEFT_WEIGHTS, LazyTensors.of(peft), metadata=metadata)
        write_file(partial / COMFYUI_WEIGHTS, LazyTensors.of(comfyui), metadata=metadata)
        for name, text in ((PEFT_CONFIG, json.dumps(config, indent=2) + "\n"), ("README.md", card)):
            (partial / name).write_text(text, encoding="utf-8")


def peft_config(layers: list[str], *, rank: int, alpha: float, source: str | None) -> dict[str, Any]:
    """adapter_config.json. source: path of the weights that the adapters were trained on."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": source,
        RANK: rank,
        ALPHA: alpha,
        "target_modules": layers,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }


def check_adapter_folder(out: Path) -> None:
    """Raise ValueError if `out` exists and is not a folder with adapters."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / PEFT_CONFIG).is_file():
        raise ValueError(f"{out}: exists and is not a folder of adapters; give a new folder")


def adapter_card(base: FrozenBase, *, step: int, steps: int, weights: str) -> str:
    """README.md of a folder of adapters of step `step` of `steps`. weights: which they are, in words."""
    rank, alpha = _settings(base)
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora]",
        "---",
        "",
        "# LoRA for a Transition Model",
        "",
        f"- base weights: {base.source or 'drawn from the seed'}, sha256 `{base.digest}`",
        f"- rank {rank}, alpha {alpha:g}; {weights} of step {step:,} of {steps:,}",
        f"- `{PEFT_WEIGHTS}` and `{PEFT_CONFIG}`: for PEFT; `{COMFYUI_WEIGHTS}`: for ComfyUI",
        "",
        "`tim sample MODEL --lora FOLDER --prompt …` merges it into the base model.",
        "",
    ]
    return "\n".join(lines)


def _settings(base: FrozenBase) -> tuple[int, float]:
    """Rank and alpha. Raises ValueError if a checkpoint does not name them."""
    try:
        return int((base.lora or {})["rank"]), float((base.lora or {})["alpha"])
    except KeyError as missing:
        raise ValueError(f"the checkpoint's trainer.json does not name the adapters' {missing.args[0]}: export another --step") from None
