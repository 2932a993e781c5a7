"""The image itself as latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tim.codecs.base import Direction, Latents, Tiling, to_levels, to_values

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


class PixelCodec:
    """The image itself as latent, values in [−1, 1]: for small images and experiments. Needs no weights.

    channels: 1 (grey), 3 (RGB), 4 (RGBA), or any other number. RGB images are accepted by 1 channel (their luma) and by 4 (opaque).
    With one channel, the cosine term of the training loss, which compares directions of channels, only compares signs.
    """

    factor = 1
    is_stochastic = False

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels

    def encode(self, images: Sequence[Tensor]) -> Latents:
        """uint8 (channels, H, W) or (3, H, W) per image → float32 (channels, H, W) in [−1, 1]. Raises ValueError for other channels."""
        return Latents([to_values(self._converted(image)) for image in images], None)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """float (channels, H, W) per image → uint8 of the same shape, clipped and rounded to the nearest level."""
        return [to_levels(latent) for latent in latents]

    def to(self, device: torch.device | str) -> None:
        """Nothing to move."""

    def tiling(self, height: int, width: int, direction: Direction = "decode") -> Tiling:
        """One conversion of the whole image: two copies in float32."""
        return Tiling(1, 8.0 * self.channels * height * width)

    def _converted(self, image: Tensor) -> Tensor:
        """The image with the codec's channels."""
        found = image.shape[0]
        if found == self.channels:
            return image
        if found == 3 and self.channels == 1:
            weights = torch.tensor(LUMA, device=image.device).view(3, 1, 1)
            return (image * weights).sum(0, keepdim=True).round()
        if found == 3 and self.channels == 4:
            return torch.cat([image, torch.full_like(image[:1], 255)])
        raise ValueError(f"codec pixel has {self.channels} channels, the image has {found}: give codec.channels={found}")
