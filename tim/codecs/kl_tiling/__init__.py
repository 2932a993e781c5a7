"""Exact tiling of KL autoencoders: the network's result on the whole image, computed in tiles under a memory limit.

A group norm needs statistics of the whole image, and they depend on every layer before. So there is one pass over the tiles per group norm,
which sums values and squares in float64; then the norm is a scale and a shift per channel, and tiles are independent. Passes start from
values kept by earlier passes where memory allows, and recompute the layers since, with the halo that these layers need.
"""

from tim.codecs.kl_tiling.planner import Plan, halo, plan
from tim.codecs.kl_tiling.regions import Region, Shape
from tim.codecs.kl_tiling.runner import run
from tim.codecs.kl_tiling.steps import Step, decoder_steps, encoder_steps

__all__ = ["Plan", "Region", "Shape", "Step", "decoder_steps", "encoder_steps", "halo", "plan", "run"]
