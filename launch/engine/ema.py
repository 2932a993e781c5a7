"""Exponential moving averages (EMA) of the weights, sharded like the optimizer state: each rank averages its own float32 weights.

No communication. Memory: 4 bytes per parameter and average, divided by the number of ranks; on the device of the weights, or in host
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from launch.checkpoints.averages import FIRST, average_kinds
from launch.checkpoints.tensor_fragments import Fragment, ShardedTensors


def decay_at(updates: int, *, decay: float) -> float:
    """Decay after `updates` updates. It warms up, so that a short run's average is not dominated by the random initialization."""
    return min(decay, (1 + updates) / (10 + updates))


class ShardedEMA:
    """Moving averages of this rank's fragments, one per decay; with decay 0 an average equals the weights."""

    def __init__(
        self, fragments: Mapping[str, Fragment], *, decay: float | Sequence[float], device: torch.device | str | None = None
    ) -> None:
        """device: where the averages are stored; None: where the weights are."""
        self.decays = tuple(decay) if isinstance(decay, Sequence) else (decay,)
        self.device = device
        self.averages = [_copy(fragments, device=device) for _ in self.decays]
        self._staging = _staging(fragments, device=device)

    @property
    def average(self) -> dict[str, Fragment]:
        """The first average, which the model folder and guidance use."""
        return self.averages[0]

    def update(self, fragments: Mapping[str, Fragment], *, updates: int) -> None:
        """Move the averages towards the weights. updates: number of previous updates."""
        rates = [1 - decay_at(updates, decay=decay) for decay in self.decays]
        for name, fragment in fragments.items():
            weights = fragment.values
            if self._staging is not None:
                weights = self._staging[: len(weights)].copy_(weights)
            for average, rate in zip(self.averages, rates, strict=True):
                average[name].values.lerp_(weights, rate)

    def pieces(self) -> dict[str, dict[str, Fragment]]:
        """The averages by the kind of their files in a checkpoint."""
        return dict(zip(average_kinds(self.decays), self.averages, strict=True))

    def load(self, pieces: Callable[[str], ShardedTensors], weights: Mapping[str, Fragment], *, saved: Sequence[float] | None) -> list[str]:
        """Load the averages of a checkpoint with the `saved` decays (None: one of unknown decay). Returns log lines.

        An average goes on if its decay was saved; so does a single one whose decay has changed. Others start from the `weights`.
        """
        kinds = dict(zip(saved, average_kinds(saved), strict=True)) if saved else {}
        if not saved or len(saved) == len(self.decays) == 1:
            kinds.setdefault(self.decays[0], FIRST)
        notes = []
        for index, decay in enumerate(self.decays):
            if decay in kinds:
                pieces(kinds[decay]).read_into(self.averages[index])
            else:
                for name, fragment in self.averages[index].items():
                    fragment.values.copy_(weights[name].values)
                notes.append(f"train.ema: the average with decay {decay:g} is new, it starts from the weights of this checkpoint")
        return notes


def _copy(fragments: Mapping[str, Fragment], *, device: torch.device | str | None) -> dict[str, Fragment]:
    return {name: Fragment(fragment.start, fragment.values.detach().to(device=device, copy=True)) for name, fragment in fragments.items()}


def _staging(fragments: Mapping[str, Fragment], *, device: torch.device | str | None) -> torch.Tensor | None:
    """Pinned host memory that fragments pass through on their way from a GPU; None if they need not move."""
    if device is None or torch.device(device).type != "cpu" or not any(fragment.values.is_cuda for fragment in fragments.values()):
        return None
    return torch.empty(max(len(fragment.values) for fragment in fragments.values()), pin_memory=True)
