"""Which parameters of a network an estimate takes as trained: those that `train.freeze` and `train.lora` leave."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from launch.config.schema import Config
from launch.finetuning.lora import is_target
from tim.network import PROJECTOR

BLOCK = re.compile(r"^blocks\.\d+\.")


@dataclass(frozen=True, slots=True)
class TrainedPart:
    """Freezes parameters of a network and adds adapters, without values: for fake networks. Networks with fewer blocks are taken as a part.

    depth: blocks of the real network. A parameter is frozen in all blocks, or, if only some blocks are to be frozen, in none.
    """

    depth: int
    freeze: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    rank: int = 0
    alignment: bool = False

    @classmethod
    def of(cls, config: Config) -> TrainedPart | None:
        """None if all parameters are trained."""
        lora, freeze = getattr(config.train, "lora", None), tuple(getattr(config.train, "freeze", None) or ())
        if lora is None and not freeze:
            return None
        depth, alignment = config.network.params.depth, config.objective.alignment is not None
        return cls(depth, freeze, () if lora is None else tuple(lora.targets), 0 if lora is None else lora.rank, alignment)

    def __call__(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            frozen = not (self.alignment and name.startswith(PROJECTOR)) if self.rank else self._is_frozen(name)
            parameter.requires_grad_(not frozen)
        if not self.rank:
            return
        layers = [name for name, module in network.named_modules() if type(module) is nn.Linear and is_target(name, self.targets)]
        for name in layers:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _Adapted(network.get_submodule(name), rank=self.rank))

    def _is_frozen(self, name: str) -> bool:
        places = [f"blocks.{number}." for number in range(self.depth)] if BLOCK.match(name) else [""]
        names = [BLOCK.sub(place, name) if place else name for place in places]
        return all(any(fnmatchcase(each, pattern) for pattern in self.freeze) for each in names)


class _Adapted(nn.Module):
    """A linear layer with an adapter of low rank, as PEFT computes it."""

    def __init__(self, base: nn.Module, *, rank: int) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base_layer = base
        with torch.device(base.weight.device):
            self.lora_a = nn.Linear(base.in_features, rank, bias=False)
            self.lora_b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x)) * 2.0
