"""Features without a network: colours and edges of a small thumbnail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tim.metrics.extractors.base import digest_of

GRID, EDGES = 8, 4  # cells a side of colours, and of edges
_SIDE = 32  # pixels a side of the thumbnail


class PixelFeatures:
    """RGB of an 8 × 8 thumbnail, and the strength of horizontal and vertical edges in 4 × 4 cells: a coarse check without weights.

    It sees layout, colours and blur, and neither objects nor text. The image is averaged over areas into 32 × 32 cells, its aspect ratio
    is not kept. All values are in [0, 1].
    """

    kind = "pixels"
    name = "pixels"
    width = 3 * GRID**2 + 2 * EDGES**2
    preprocessing = f"squashed to {_SIDE} × {_SIDE} pixels by averaging areas"
    digest = digest_of("pixels", "1", str(GRID), str(EDGES), str(_SIDE))

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        if not images:
            return torch.zeros(0, self.width)
        thumbnails = torch.stack([_thumbnail(image) for image in images])
        colours = F.avg_pool2d(thumbnails, _SIDE // GRID).flatten(1)
        luma = (thumbnails * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        across = F.avg_pool2d(F.pad(luma.diff(dim=3).abs(), (0, 1, 0, 0)), _SIDE // EDGES)
        down = F.avg_pool2d(F.pad(luma.diff(dim=2).abs(), (0, 0, 0, 1)), _SIDE // EDGES)
        return torch.cat([colours, across.flatten(1), down.flatten(1)], dim=1)


def _thumbnail(image: Image.Image) -> Tensor:
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(_SIDE, _SIDE, 3).permute(2, 0, 1).float() / 255
