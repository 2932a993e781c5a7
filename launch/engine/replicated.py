"""ZeRO 0: every rank holds all weights and moments, and applies the same update.

Under ZeRO 0 DeepSpeed sums gradients over ranks, but neither reports their norm nor skips an update whose gradient is not finite. These
optimizers do, as ZeRO does. Checkpoints divide whole parameters among the ranks, so that a run resumes on any layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from launch.engine.deepspeed_internals import Share
from launch.engine.muon import Muon
from launch.engine.parameter_groups import trained_parameters


class Replicated(torch.optim.Optimizer):
    """Optimizer that clips the gradient, and skips the update if it is not finite. The gradient is equal on all ranks, so all decide alike.

    grad_norm: norm of the last gradient before clipping. overflow: whether the last update was skipped; DeepSpeed reads it.
    """

    clip = 0.0
    grad_norm = 0.0
    overflow = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.grad_norm = float(norm)
        self.overflow = not bool(norm.isfinite())
        if self.overflow:
            return
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        super().step(closure)


class ReplicatedAdamW(Replicated, torch.optim.AdamW):
    """AdamW under ZeRO 0."""


class ReplicatedMuon(Replicated, Muon):
    """Muon under ZeRO 0."""


def whole_parameters(network: nn.Module) -> dict[str, Share]:
    """Every trained parameter as one share, which holds all of it."""
    return {name: Share(0, parameter, 0, parameter.numel()) for name, parameter in trained_parameters(network)}


def owned_parameters(sizes: Mapping[str, int], *, rank: int, ranks: int) -> list[str]:
    """Names of the parameters that a rank saves and averages: largest first, each to the rank with the fewest elements so far."""
    totals = [0] * ranks
    owned: list[str] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        receiver = min(range(ranks), key=totals.__getitem__)
        totals[receiver] += sizes[name]
        if receiver == rank:
            owned.append(name)
    return owned
