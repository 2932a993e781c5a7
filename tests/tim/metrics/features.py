"""Random features."""

from __future__ import annotations

import torch
from torch import Tensor


def features(count: int, width: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """(count, width) float64, normal, with mean `shift` and standard deviation `scale`."""
    return scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
