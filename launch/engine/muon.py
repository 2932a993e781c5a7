"""Muon for hidden matrices and AdamW for all other parameters, on the weight shards of ZeRO 1 and 2, or whole weights under ZeRO 0.

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

    Under ZeRO 1 and 2 DeepSpeed replaces a group's parameters by this rank's equal share of their concatenation (the last share is
    padded); `shapes` are the parameters' shapes. Each rank gathers the momentum and orthogonalises the matrices that overlap its share.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("shapes")]
        super().step()
        self.param_groups = groups
        for group in groups:
            for weights in group["params"] if group.get("shapes") else ():
                self._step_matrices(weights, group)

    def _step_matrices(self, weights: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix, or this rank's share of all matrices of a group."""
        if weights.grad is None:
            return
        state = self.state[weights]
        if not state:
            state["momentum"] = torch.zeros_like(weights)
        momentum = state["momentum"].lerp_(weights.grad, 1 - MOMENTUM)
        nesterov = weights.grad.lerp(momentum, MOMENTUM)  # Nesterov momentum
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        update = _scaled(nesterov) if weights.ndim == 2 else self._orthogonal(nesterov, group["shapes"])
        weights.add_(update, alpha=-group["lr"])

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
                matrix = _scaled(gathered[start:stop].view(shape)).flatten()
                result[low - first : high - first] = matrix[low - start : high - start]
            start = stop
        return result


def _scaled(matrix: Tensor) -> Tensor:
    """The orthogonalised matrix with the RMS of AdamW's updates, in half precision on GPUs."""
    return 0.2 * math.sqrt(max(matrix.shape)) * orthogonalise(matrix.bfloat16() if matrix.is_cuda else matrix)


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
