"""What the metrics need to know about the images of a step besides their losses: times, tokens, and the work that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.cost import DIFFUSION, Floats
from pipeline.loading.loader import Batch
from tim.flops import Lengths, step_flops
from tim.objective import TransitionObjective


class ImageFacts:
    """Facts of packs, from what is on the host.

    params: the network's, complete; alignment: whether its projection is trained; trained: share of the weights of matrices that is.
    """

    def __init__(self, objective: TransitionObjective, *, params: Mapping[str, Any], alignment: bool, trained: float) -> None:
        self._objective = objective
        self._params = params
        self._alignment = alignment
        self._trained = trained

    def tokens(self, batches: Sequence[Batch]) -> list[int]:
        """Tokens of each image of the packs; 1 for a dummy."""
        cells = self._objective.patch_size**2
        return [noise.shape[-2] * noise.shape[-1] // cells for batch in batches for noise in batch.noise]

    def times(self, batches: Sequence[Batch]) -> Floats:
        """(n,) t of each image, as share of the way from the image to pure noise."""
        transport = self._objective.transport
        uniforms, kinds = (torch.cat(parts) for parts in zip(*((batch.uniforms, batch.kinds) for batch in batches), strict=True))
        t, _ = self._objective.draw_times(uniforms, kinds, [noise for batch in batches for noise in batch.noise])
        return (t.numpy() - transport.end) / (transport.start - transport.end)

    def flops(self, batches: Sequence[Batch], *, text: Sequence[Sequence[int]]) -> int:
        """Floating-point operations of the network for a step's planned images. text: lengths of the captions by pack; () of classes."""
        ids = [id for batch in batches for id in batch.ids]
        real = [image for image, id in enumerate(ids) if id]
        if not real:
            return 0
        moving = np.concatenate([batch.kinds.numpy() for batch in batches]) != DIFFUSION
        captions = [length for of_pack in text for length in of_pack]
        lengths = Lengths(self.tokens(batches), captions or None).of(real)
        positions = np.flatnonzero(moving[real]).tolist()
        return step_flops(self._params, lengths, moving=positions, alignment=self._alignment, trained=self._trained)
