"""Codecs: images to latents and back. The network only ever sees latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PixelCodec:
    """The image itself as latent, values in [−1, 1]: for small pictures and for trying things out. Needs no weights."""

    factor = 1  # pixels per side of a latent cell
    channels = 3

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """uint8 (3, H, W) per image → float32 (3, H, W) in [−1, 1]."""
        return [image.float() / 127.5 - 1 for image in images]

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (3, H, W) per image → uint8 (3, H, W), clipped and rounded to the nearest level."""
        return [((latent.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for latent in latents]


class Geometry(NamedTuple):
    """factor: pixels per side of a latent cell; channels: of a latent. All that planning and counting have to know of a codec."""

    factor: int
    channels: int


CODECS = {"pixel": PixelCodec}
Codec = PixelCodec
GEOMETRIES = {
    **{kind: Geometry(codec.factor, codec.channels) for kind, codec in CODECS.items()},
    "sd-vae": Geometry(8, 4),
    "dc-ae": Geometry(32, 32),
}


def make(kind: str) -> Codec:
    """A codec by name. Raises ValueError for an unknown one, and for one of which this version knows the geometry only."""
    if kind not in CODECS:
        known = f"codec {kind} can be planned for, but not run by this version" if kind in GEOMETRIES else f"unknown codec {kind!r}"
        raise ValueError(f"{known}: choose one of {', '.join(CODECS)}")
    return CODECS[kind]()
