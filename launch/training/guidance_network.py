"""EMA network for guidance in the training target: a full low-precision copy on every rank.

The EMA weights are sharded over the ranks (`launch.engine.ema`). Every n-th step the copy is updated from them, one parameter at a
time. Its matrices are bfloat16 (2 bytes per parameter), and it runs under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from launch.checkpoints.tensor_fragments import Fragment
from launch.distributed.ranks import Ranks
from tim import PackedTokens
from tim.packed import Condition

FILE = "replica.safetensors"  # saved in checkpoints, because between two updates it is older than the average


class GuidanceNetwork:
    """Frozen copy of the network, uninitialized until `update_from` or `load`. Call it like the network."""

    @torch.no_grad()
    def __init__(self, network: nn.Module, *, ranks: Ranks, frozen: Iterable[tuple[str, Tensor]] = ()) -> None:
        """network: on the meta device; ownership passes to this object. frozen: weights that have no average (`Engine.frozen`)."""
        self.ranks = ranks
        self.network = network.to_empty(device=ranks.device).eval().requires_grad_(False)
        for parameter in self.network.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()
        parameters = dict(self.network.named_parameters())
        for name, value in frozen:
            parameters.pop(name).copy_(value)
        self._averaged = parameters

    def __call__(self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /) -> PackedTokens:
        with torch.no_grad(), torch.autocast(self.ranks.device.type, torch.bfloat16):
            return self.network(packed, t, r, condition)

    @torch.no_grad()
    def update_from(self, average: Mapping[str, Fragment]) -> None:
        """Gather the average from the fragments of all ranks. Must be called by all ranks."""
        for name, parameter in self._averaged.items():
            flat = torch.zeros(math.prod(parameter.shape), device=self.ranks.device)
            if name in average:
                fragment = average[name]
                flat[fragment.start : fragment.start + fragment.values.numel()] = fragment.values
            parameter.copy_(self.ranks.total(flat).view(parameter.shape))

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights of the copy. They are equal on all ranks, so one rank saves them."""
        return {name: parameter.detach() for name, parameter in self._averaged.items()}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = load_file(folder / FILE)
        for name, parameter in self._averaged.items():
            parameter.copy_(saved[name])
