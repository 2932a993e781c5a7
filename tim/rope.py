"""Two-dimensional rotary position embedding (RoPE) over packs of images.

The first half of each head encodes one coordinate of the patch, the second half the other; features 2i and 2i+1 are a pair.
Layouts:

- `rowcol`: first half = column, second half = row, counted from the top left corner. Equals the published networks on squares.
- `centred`: the same, counted from the centre of the image. Self-attention sees only differences, so it is unaffected. Caption
  cross-attention rotates only the queries, so it learns a token's position relative to the centre instead of the corner.
- `legacy`: the grid of the published networks, which swaps height and width of non-square images (token k gets k mod h and k div h);
  only for their weights.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from tim.model_kinds import RopeLayout
from tim.packed import PackedTokens

LAYOUTS = get_args(RopeLayout)


def rotations(packed: PackedTokens, *, head_dim: int, layout: str, theta: float = 10000.0) -> Tensor:
    """Unit complex numbers, (T, 1, head_dim/2), for `rotate` to apply to queries and keys. Always float32."""
    row, column = packed.positions.unbind(-1)
    if layout != "rowcol":
        height, width = torch.tensor(packed.sizes).to(row.device, non_blocking=True)[packed.owner].unbind(-1)
        if layout == "centred":
            row, column = row - (height - 1) / 2, column - (width - 1) / 2
        else:
            token = row * width + column
            column, row = token % height, token // height
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, device=row.device, dtype=torch.float32) / half)
    angles = torch.cat([column[:, None] * frequencies, row[:, None] * frequencies], dim=-1)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x_THD: Tensor, rotations_T1D: Tensor) -> Tensor:
    """Rotate every pair of features by its angle, at least in float32; the result has the dtype of `x_THD`.

    Rotations are complex, or their real and imaginary parts, (T, 1, D/2, 2), which torch.compile can fuse.
    """
    full = x_THD if x_THD.dtype == torch.float64 else x_THD.float()
    if not rotations_T1D.is_complex():
        (a, b), (cosine, sine) = full.unflatten(-1, (-1, 2)).unbind(-1), rotations_T1D.unbind(-1)
        return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2).to(x_THD.dtype)
    pairs = torch.view_as_complex(full.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations_T1D).flatten(-2).to(x_THD.dtype)
