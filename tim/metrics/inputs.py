"""Checks of feature matrices.

Legend, here and in the modules beside: N real images, M generated images, F features of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Subsets = Callable[[Tensor, Tensor], float]
"""Distance between some real and some generated images, given by their rows, (n,) and (m,). What all subsets share is computed once."""


def checked(real: Tensor, generated: Tensor, *, least: int = 2) -> tuple[Tensor, Tensor]:
    """The features (N, F) and (M, F), detached. Raises ValueError if they cannot be compared, or are not finite."""
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"{name} features: expected floats (images, width), got {features.dtype} {tuple(features.shape)}")
        if len(features) < least:
            raise ValueError(f"{name} features: a distance needs at least {least} images, there are {len(features)}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name} features: some are not finite: check the weights of the extractor")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real images have {real.shape[1]} features, generated ones {generated.shape[1]}: use one extractor for both")
    return real.detach(), generated.detach()
