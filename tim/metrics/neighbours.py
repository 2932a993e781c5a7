"""Precision and recall by nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991).

The manifold of a set is the union of balls around its images, each as large as the distance to the `NEIGHBOURS`-th nearest other image.
Precision is the share of generated images within the manifold of the real ones; recall, of real images within that of the generated ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tim.metrics.inputs import Subsets, checked

NEIGHBOURS = 3
_BLOCK = 1024  # images a block of distances


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of (M, F) against (N, F). Raises ValueError if a set has no more than `neighbours` images."""
    real, generated = _precise(*checked(real, generated, least=neighbours + 1))
    return _share(generated, real, neighbours), _share(real, generated, neighbours)


def precision_subsets(real: Tensor, generated: Tensor) -> Subsets:
    """Precision of subsets of images."""
    real, generated = _precise(*checked(real, generated, least=NEIGHBOURS + 1))
    within, across = torch.cdist(real, real), torch.cdist(generated, real)

    def precision(rows: Tensor, columns: Tensor) -> float:
        radii = within[rows][:, rows].kthvalue(NEIGHBOURS + 1).values
        return float((across[columns][:, rows] <= radii).any(dim=1).double().mean())

    return precision


def recall_subsets(real: Tensor, generated: Tensor) -> Subsets:
    """Recall of subsets of images: precision with the roles exchanged."""
    precision = precision_subsets(generated, real)
    return lambda rows, columns: precision(columns, rows)


def _share(images: Tensor, others: Tensor, neighbours: int) -> float:
    """Share of images (A, F) within the manifold of others (B, F), in blocks."""
    radii = torch.cat([torch.cdist(block, others).kthvalue(neighbours + 1).values for block in others.split(_BLOCK)])
    inside = [(torch.cdist(block, others) <= radii).any(dim=1) for block in images.split(_BLOCK)]
    return float(torch.cat(inside).double().mean())


def _precise(*sets: Tensor) -> Iterator[Tensor]:
    """Features in float32 or better."""
    return (features.to(torch.promote_types(features.dtype, torch.float32)) for features in sets)
