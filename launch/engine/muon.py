"""Muon for hidden matrices and AdamW for all other parameters, on whole weights or on the weight shards of ZeRO.

Muon (Jordan et al. 2024) replaces the gradients' momentum by the nearest orthogonal matrix. The many weak directions of a gradient then
have the same weight as the few strong ones, which Adam's element-wise scaling cannot achieve. The update has the RMS of AdamW's
(arXiv 2502.16982, §2.2), so both use one learning rate and one weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that moves singular values fastest into 0.7 … 1.2
ITERATIONS = 5
_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor  # renamed in torch 2.14


@dataclass(frozen=True, slots=True)
class Column:
    """A matrix under ZeRO 3: each rank holds `count` of its elements (the last rank's are padded) at `offset` of a flat vector."""

    shape: tuple[int, ...]
    offset: int
    count: int


class Muon(torch.optim.AdamW):
    """Groups with `shapes` are stepped by Muon, the others by AdamW.

    Under ZeRO 1 and 2 DeepSpeed replaces a group's parameters by this rank's equal share of their concatenation (the last share is
    padded); `shapes` are the parameters' shapes. Under ZeRO 3 it replaces them by flat vectors of parts of every parameter. Each rank
    gathers the momentum and orthogonalises the matrices that overlap its share, under ZeRO 3 all of them.

    device: where matrices are gathered, if not where they are stored. columns: the matrices in each flat vector of ZeRO 3.
    """

    device: torch.device | None = None
    columns: Mapping[Tensor, Sequence[Column]] = {}

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
        if weights.ndim == 2:
            update = _scaled(nesterov)
        elif weights in self.columns:
            update = self._columns_of(nesterov, self.columns[weights])
        else:
            update = self._slice_of(nesterov, group["shapes"])
        weights.add_(update, alpha=-group["lr"])

    def _slice_of(self, share: Tensor, shapes: Iterable[tuple[int, int]]) -> Tensor:
        """ZeRO 1 and 2: this rank's share of the orthogonalised matrices. share: its share of the matrices."""
        gathered = self._gathered(share).view(-1)
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

    def _columns_of(self, share: Tensor, columns: Iterable[Column]) -> Tensor:
        """ZeRO 3: this rank's parts of the orthogonalised matrices. share: its parts of the matrices."""
        gathered = self._gathered(share)
        result = torch.zeros_like(share)
        for column in columns:
            parts = gathered[:, column.offset : column.offset + column.count]
            matrix = _scaled(parts.flatten()[: math.prod(column.shape)].view(column.shape)).flatten()
            mine = matrix[dist.get_rank() * column.count :][: column.count]
            result[column.offset : column.offset + len(mine)] = mine
        return result

    def _gathered(self, share: Tensor) -> Tensor:
        """The shares of all ranks, (ranks, elements), in half precision on GPUs."""
        device = self.device or share.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        gathered = torch.empty(dist.get_world_size() * len(share), dtype=dtype, device=device)
        _gather(gathered, share.to(device, dtype))
        return gathered.view(-1, len(share))


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
