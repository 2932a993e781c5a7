"""Autoencoders with a distribution of latents per image: diffusers' AutoencoderKL (Stable Diffusion, SDXL, SD3, FLUX.1)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from tim.codecs import kl_tiling
from tim.codecs.autoencoder import Autoencoder
from tim.codecs.base import Direction, Tiling, to_levels
from tim.codecs.kl_tiling import Plan, Shape, Step

WORK = 4 * 6  # bytes per pixel and channel of the largest map, for diffusers' code on the whole image

PLANNED = 0.9  # of the limit: measured peaks were up to 3 % above the predicted ones


class KL(Autoencoder):
    """diffusers' AutoencoderKL. `encode` gives the mean and deviation of each latent."""

    is_stochastic = True

    def encode_values(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B, 3, H, W) → means and deviations (B, C, h, w)."""
        distribution = self.network.encode(values).latent_dist
        return distribution.mean, distribution.std

    def encode_tiled(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (3, H, W) → means and deviations (1, C, h, w), with the statistics of the whole image in every group norm."""
        plan = self._plan(image.shape[-2], image.shape[-1], "encode")
        moments = torch.empty(plan.shapes[-1], device=self.device)
        for (rows, columns), values in kl_tiling.run(plan, image, device=self.device):
            moments[:, slice(*rows), slice(*columns)] = values
        mean, log_variance = moments[None].chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()  # clamped as diffusers does

    def decode_tiled(self, cells: Tensor) -> Tensor:
        """The network's latents (1, C, h, w) → uint8 (1, 3, H, W). Each tile is converted to levels as it comes."""
        side = self._downsampling
        plan = self._plan(cells.shape[-2] * side, cells.shape[-1] * side, "decode")
        image = cells.new_empty((1, *plan.shapes[-1]), dtype=torch.uint8)
        for (rows, columns), values in kl_tiling.run(plan, cells[0], device=self.device):
            image[0, :, slice(*rows), slice(*columns)] = to_levels(values)
        return image

    def plan_tiling(self, height: int, width: int, direction: Direction) -> Tiling:
        """The whole image if it fits into `memory`, else the cheapest plan of `tim.codecs.kl_tiling`, counted as two tiles or more."""
        whole = Tiling(1, self._whole_bytes(height, width, direction))
        if whole.bytes <= self.memory or not self._steps[direction]:
            return whole
        plan = self._plan(height, width, direction)
        if plan.peak >= whole.bytes:
            return whole
        sides = [(max(plan.shapes[each.stop][1:]), each.side) for each in plan.passes if each.side is not None]
        return Tiling(max((2, *(-(-longest // side) for longest, side in sides))), plan.peak)

    @property
    def _downsampling(self) -> int:
        """Pixels per side of a cell of the network's latents."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def _whole_bytes(self, height: int, width: int, direction: Direction) -> float:
        config = self.network.config
        channels = tuple(config.block_out_channels)
        if direction == "decode":
            channels = tuple(getattr(config, "decoder_block_out_channels", None) or channels)
            channels = (*channels[1:], channels[-1])  # the first block of a stage reads the channels of the deeper one
        return WORK * height * width * max(count / 4**depth for depth, count in enumerate(channels))

    def _plan(self, height: int, width: int, direction: Direction) -> Plan:
        """The plan for an image of this size in pixels. Plans are kept: one takes up to a second."""
        key = (height, width, direction, self.memory)
        if key not in self._plans:
            side, channels = (1, 3) if direction == "encode" else (self._downsampling, self.network.config.latent_channels)
            shape = Shape(channels, height // side, width // side)
            self._plans[key] = kl_tiling.plan(self._steps[direction], shape, memory=PLANNED * self.memory)
        return self._plans[key]

    @cached_property
    def _plans(self) -> dict[tuple[int, int, Direction, float], Plan]:
        return {}

    @cached_property
    def _steps(self) -> dict[Direction, tuple[Step, ...]]:
        """Steps of both parts; none if their blocks are of a kind that has no exact tiling."""
        try:
            return {"encode": kl_tiling.encoder_steps(self.network), "decode": kl_tiling.decoder_steps(self.network)}
        except ValueError:
            return {"encode": (), "decode": ()}
