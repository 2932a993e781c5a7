"""Muon for the hidden matrices, AdamW for everything else, on the slices of the weights that ZeRO 1 and 2 give to a rank.

Muon (Jordan et al. 2024) takes the step along the nearest orthogonal matrix of the gradients' momentum. So the many weak directions of
a gradient count as much as the few strong ones, which Adam's element-wise scale cannot do. The step is scaled to the size of
AdamW's (arXiv 2502.16982, §2.2): one learning rate and one weight decay serve both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic that lifts singular values fastest into 0.7 … 1.2
ITERATIONS = 5
_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor  # renamed in torch 2.14


class Muon(torch.optim.AdamW):
    """Groups with `shapes` are stepped by Muon, the others by AdamW.

    DeepSpeed replaces a group's parameters by one flat vector, this rank's equal share of all of them end to end (its last one padded);
    `shapes` says what lies there. Each rank gathers the momentum and orthogonalises the matrices that its share touches.
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
        ahead = share.grad.lerp(momentum, MOMENTUM)  # Nesterov's look ahead
        share.mul_(1 - group["lr"] * group["weight_decay"])
        share.add_(self._orthogonal(ahead, group["shapes"]), alpha=-group["lr"])

    def _orthogonal(self, share: Tensor, shapes: Iterable[tuple[int, int]]) -> Tensor:
        """This rank's share of the orthogonalised matrices, from its share of the matrices."""
        whole = share.new_empty(dist.get_world_size() * len(share), dtype=torch.bfloat16 if share.is_cuda else torch.float32)
        _gather(whole, share.to(whole.dtype))
        first = dist.get_rank() * len(share)
        result = torch.zeros_like(share)
        start = 0
        for shape in shapes:
            stop = start + math.prod(shape)
            low, high = max(start, first), min(stop, first + len(share))
            if low < high:
                matrix = orthogonalise(whole[start:stop].view(shape)).flatten()
                scale = 0.2 * math.sqrt(max(shape))  # the root mean square of AdamW's steps
                torch.mul(matrix[low - start : high - start], scale, out=result[low - first : high - first])
            start = stop
        return result


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix with all singular values near 1, by Newton-Schulz iterations. (M, N) → (M, N)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-12)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: the matrices of `network.blocks`, not embeddings, the final layer, gains and biases."""
    return [parameter for name, parameter in network.named_parameters() if name.startswith("blocks.") and parameter.ndim == 2]
