"""Codecs: images to latents and back. The network sees only latents.

| kind | what it is | pixels per cell, channels | the network's latents |
| --- | --- | --- | --- |
| pixel | the image itself; no weights | 1, any | values in [−1, 1] |
| sd-vae | Stable Diffusion's (AutoencoderKL), stochastic | 8, 4 | z · scaling_factor |
| sd3-vae | Stable Diffusion 3's (AutoencoderKL), stochastic | 8, 16 | (z − shift_factor) · scaling_factor |
| flux-vae | FLUX.1's (AutoencoderKL), stochastic | 8, 16 | (z − shift_factor) · scaling_factor |
| flux2-vae | FLUX.2's (AutoencoderKLFlux2) | 16, 128 | means of 2 × 2 cells, normalised by the statistics of `bn` |
| kl | any AutoencoderKL, stochastic | from its config | (z − shift_factor) · scaling_factor |
| dc-ae | the deep compression autoencoder (AutoencoderDC, arXiv 2410.10733) | 32, 32 | z · scaling_factor |
| tiny | a small, fast approximation of another one (AutoencoderTiny) | from its config | z · scaling_factor |

The classes are diffusers'; the factors are those of the weights' config. Large images are processed in tiles, with the same result
(`tiles`, `dc_ae_layers`).
"""

from tim.codecs.base import Codec, Geometry, Latents
from tim.codecs.load import CODECS, GEOMETRIES, digest, geometry, is_stochastic, location, make, weights_folder, without_weights
from tim.codecs.pixel import PixelCodec

__all__ = [
    "CODECS", "GEOMETRIES", "Codec", "Geometry", "Latents", "PixelCodec", "digest", "geometry", "is_stochastic", "location", "make",
    "weights_folder", "without_weights",
]  # fmt: skip
