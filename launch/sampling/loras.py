"""LoRA files of `tim sample --lora FILE[:SCALE]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tim.pretrained.lora_files import merge_adapters, read_adapters


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file, or a folder of PEFT, and its strength."""

    path: Path
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.path} at {self.scale:g}"


def parse_loras(typed: Sequence[str]) -> list[Lora]:
    """Parse FILE or FILE:SCALE. Raises ValueError if the scale is not a number."""
    return [_parse(each) for each in typed]


def merge_loras(network: nn.Module, loras: Sequence[Lora]) -> None:
    """Merge LoRA files into a network's weights, in place. Raises ValueError if one cannot be read or does not fit."""
    for lora in loras:
        merge_adapters(network, read_adapters(lora.path), scale=lora.scale, source=lora.path)


def _parse(typed: str) -> Lora:
    path, colon, scale = typed.rpartition(":")
    if not colon or Path(typed).exists():
        return Lora(Path(typed))
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"--lora {typed}: {scale!r} is not a number; give FILE or FILE:SCALE, for example {path}:0.8")
    return Lora(Path(path), value)
