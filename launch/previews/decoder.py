"""A codec whose failures do not interrupt the ranks, which evaluate the network together under ZeRO 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import kind_and_line
from tim.codecs import Codec, Latents
from tim.codecs.base import Direction, Tiling


class Decoder:
    """Decodes like `codec`. A failure, such as no memory, is kept as one line in `problem`, and the images are black."""

    def __init__(self, codec: Codec) -> None:
        self.problem = ""
        self.factor, self.channels, self.is_stochastic = codec.factor, codec.channels, codec.is_stochastic
        self._codec = codec

    def encode(self, images: Sequence[Tensor]) -> Latents:
        """As `tim.codecs.Codec.encode`."""
        return self._codec.encode(images)

    def to(self, device: torch.device | str) -> None:
        """As `tim.codecs.Codec.to`."""
        self._codec.to(device)

    def tiling(self, height: int, width: int, direction: Direction = "decode") -> Tiling:
        """As `tim.codecs.Codec.tiling`."""
        return self._codec.tiling(height, width, direction)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor)"""
        try:
            return self._codec.decode(latents)
        except Exception as error:
            self.problem = kind_and_line(error)
        sizes = [(side * self.factor for side in latent.shape[-2:]) for latent in latents]
        return [torch.zeros(3, height, width, dtype=torch.uint8) for height, width in sizes]
