"""The image itself as latent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tim.codecs.base import Latents, to_levels, to_values


class PixelCodec:
    """The image itself as latent, values in [−1, 1]: for small images and experiments. Needs no weights."""

    factor = 1
    channels = 3
    is_stochastic = False

    def encode(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (3, H, W) per image → float32 (3, H, W) in [−1, 1]."""
        return Latents([to_values(image) for image in images], None)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (3, H, W) per image → uint8 (3, H, W), clipped and rounded to the nearest level."""
        return [to_levels(latent) for latent in latents]
