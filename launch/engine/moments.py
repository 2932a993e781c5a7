"""Moments of the optimizers as fragments of parameters, which checkpoints store and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from launch.checkpoints.tensor_fragments import Fragment, ShardedTensors
from launch.engine.deepspeed_internals import Share

Pieces = Callable[[str], ShardedTensors]


class Moments:
    """Moments of torch's AdamW and our Muon: float32, one element per weight, in the optimizer's state under their kind."""

    def __init__(self, optimizer: torch.optim.Optimizer, kinds: Sequence[str], *, counts_in_tensors: bool) -> None:
        """counts_in_tensors: whether the optimizer keeps its number of updates in tensors."""
        self.kinds = kinds
        self._optimizer = optimizer
        self._counts_in_tensors = counts_in_tensors

    def fragments(self, shares: Mapping[str, Share]) -> dict[str, dict[str, Fragment]]:
        """Views of the moments by kind and parameter; empty before the first update."""
        moments: dict[str, dict[str, Fragment]] = {kind: {} for kind in self.kinds}
        for name, share in shares.items():
            state = self._optimizer.state.get(share.weights, {})
            for kind in self.kinds:
                if kind in state:
                    moments[kind][name] = share.of(state[kind])
        return moments

    def load(self, pieces: Pieces, shares: Mapping[str, Share], *, updates: int) -> None:
        """Load the moments after `updates` updates. pieces: opens the saved moments of a kind."""
        for kind in self.kinds:
            saved = pieces(kind)
            saved.read_into({name: share.of(self._moment(kind, share.weights)) for name, share in shares.items() if name in saved})
        self._set_count(updates)

    def _moment(self, kind: str, weights: Tensor) -> Tensor:
        """Moments vector of a vector of weights; created with zeros if missing."""
        state = self._optimizer.state[weights]
        if kind not in state:
            state[kind] = torch.zeros_like(weights)
        return state[kind]

    def _set_count(self, updates: int) -> None:
        for weights, state in self._optimizer.state.items():
            state["step"] = torch.tensor(float(updates), device=weights.device) if self._counts_in_tensors else updates
