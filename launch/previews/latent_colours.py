"""Previews without the codec: the colours of latents, by the linear map that `tim encode` fitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from launch.config.schema import Config
from pipeline.features.manifest import Features
from tim import codecs
from tim.codecs import Geometry, Latents
from tim.codecs.base import Direction, Tiling
from tim.sampling.live_view import LiveView


class LatentColours:
    """Stands in for a codec that cannot be loaded. Each cell of a latent becomes a square of one colour."""

    is_stochastic = False

    def __init__(self, view: LiveView, geometry: Geometry) -> None:
        self.factor, self.channels = geometry
        self._view = view

    @classmethod
    def of(cls, config: Config) -> LatentColours | None:
        """From the first features of the run's corpora that have a map. None if there are none."""
        folders = [corpus.features for corpus in config.corpus if corpus.features is not None]
        for folder in folders:
            content = Features.open(folder).live_view
            if content is not None:
                codec = config.codec
                return cls(LiveView.from_json(content), codecs.geometry(codec.kind, codec.path, channels=codec.channels))
        return None

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (C, h, w) per image → uint8 (3, h·factor, w·factor)."""
        colours = [self._view.rgb(latent) for latent in latents]
        return [each.repeat_interleave(self.factor, 1).repeat_interleave(self.factor, 2) for each in colours]

    def encode(self, images: Sequence[Tensor]) -> Latents:
        """Not possible without the codec. Raises ValueError."""
        raise ValueError("images cannot be encoded without the codec")

    def to(self, device: torch.device | str) -> None:
        """Nothing to move."""

    def tiling(self, height: int, width: int, direction: Direction = "decode") -> Tiling:
        """One conversion of the whole image."""
        return Tiling(1, 3.0 * height * width)
