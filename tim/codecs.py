"""Codecs: images to latents and back. The network only ever sees latents."""

from __future__ import annotations

from collections.abc import Sequence

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


CODECS = {"pixel": PixelCodec}
Codec = PixelCodec


def make(kind: str) -> Codec:
    """A codec by name. Raises ValueError for an unknown one."""
    if kind not in CODECS:
        raise ValueError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}")
    return CODECS[kind]()
