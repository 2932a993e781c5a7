"""All weights of a run that trains a part of them: the frozen ones, with the trained ones and the adapters put into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from launch.checkpoints.finetuned.base import FrozenBase
from launch.checkpoints.tensor_fragments import ShardedTensors
from launch.finetuning.lora import PARTS, adapted_layers
from tim.pretrained.lora_files import Adapter
from tim.pretrained.safetensors_files import LazyTensors


def adapters_of(pieces: ShardedTensors, *, base: FrozenBase) -> dict[str, Adapter]:
    """The adapters of a checkpoint by layer. Empty without LoRA."""
    layers = adapted_layers(list(pieces.shapes)) if base.lora is not None else ()
    alpha = (base.lora or {}).get("alpha", 1.0)
    return {layer: Adapter(pieces.tensor(layer + PARTS["a"]), pieces.tensor(layer + PARTS["b"]), alpha) for layer in layers}


def merged(pieces: ShardedTensors, frozen: Mapping[str, Tensor], *, base: FrozenBase) -> LazyTensors:
    """All weights, in float32. pieces: trained weights of a checkpoint; frozen: the network that the run began with."""
    adapters = adapters_of(pieces, base=base)

    def read(name: str) -> Tensor:
        if name in pieces.shapes:
            return pieces.tensor(name)
        layer = name.removesuffix(".weight")
        return frozen[name] + adapters[layer].change() if name != layer and layer in adapters else frozen[name]

    shapes = {name: tuple(value.shape) for name, value in frozen.items()}
    return LazyTensors(shapes, dict.fromkeys(shapes, torch.float32), read)
