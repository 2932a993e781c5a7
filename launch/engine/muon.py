"""Muon for hidden matrices and AdamW for all other parameters, on the weight shards of ZeRO 1 and 2.

Muon (Jordan et al. 2024) replaces the gradients' momentum by the nearest orthogonal matrix. The many weak directions of a gradient then
have the same weight as the few strong ones, which Adam's element-wise scaling cannot achieve. The update has the RMS of AdamW's
(arXiv 2502.16982, §2.2), so both use one learning rate and one weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that moves singular values fastest into 0.7 … 1.2
ITERATIONS = 5
_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor  # renamed in torch 2.14


class Muon(torch.optim.AdamW):
    """Groups with `shapes` are stepped by Muon, the others by AdamW.

    DeepSpeed replaces a group's parameters by this rank's equal share of their concatenation (the last share is padded); `shapes` are the
    parameters' shapes. Each rank gathers the momentum and orthogonalises the matrices that overlap its share.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("shapes")]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group.get("shapes"):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        (share,) = group["params"]
        if share.grad is None:
            return
        state = self.state[share]
        if not state:
            state["momentum"] = torch.zeros_like(share)
        momentum = state["momentum"].lerp_(share.grad, 1 - MOMENTUM)
        nesterov = share.grad.lerp(momentum, MOMENTUM)  # Nesterov momentum
        share.mul_(1 - group["lr"] * group["weight_decay"])
        share.add_(self._orthogonal(nesterov, group["shapes"]), alpha=-group["lr"])

    def _orthogonal(self, share: Tensor, shapes: Iterable[tuple[int, int]]) -> Tensor:
        """This rank's share of the orthogonalised matrices. share: its share of the matrices."""
        gathered = share.new_empty(dist.get_world_size() * len(share), dtype=torch.bfloat16 if share.is_cuda else torch.float32)
        _gather(gathered, share.to(gathered.dtype))
        first = dist.get_rank() * len(share)
        result = torch.zeros_like(share)
        start = 0
        for shape in shapes:
            stop = start + math.prod(shape)
            low, high = max(start, first), min(stop, first + len(share))
            if low < high:
                matrix = orthogonalise(gathered[start:stop].view(shape)).flatten()
                scale = 0.2 * math.sqrt(max(shape))  # matches the RMS of AdamW's updates
                torch.mul(matrix[low - start : high - start], scale, out=result[low - first : high - first])
            start = stop
        return result


def orthogonalise(matrix: Tensor) -> Tensor:
    """Move all singular values of a matrix (M, N) close to 1 by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-12)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """Parameters that Muon updates: matrices of `network.blocks`, not embeddings, the final layer, gains or biases."""
    return [parameter for name, parameter in network.named_parameters() if name.startswith("blocks.") and parameter.ndim == 2]
