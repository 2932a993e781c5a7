"""Codecs: images to latents and back. The network sees only latents.

| kind | what it is | pixels per cell, channels |
| --- | --- | --- |
| pixel | the image itself; no weights | 1, 3 |
| sd-vae | Stable Diffusion's autoencoder (diffusers' AutoencoderKL), stochastic | 8, 4 |
| kl | any AutoencoderKL, stochastic | from its config |
| dc-ae | the deep compression autoencoder (AutoencoderDC, arXiv 2410.10733) | 32, 32 |
| tiny | a small, fast approximation of another autoencoder (AutoencoderTiny) | from its config |
"""

from tim.codecs.base import Codec, Geometry, Latents
from tim.codecs.load import CODECS, GEOMETRIES, digest, geometry, is_stochastic, location, make, weights_folder
from tim.codecs.pixel import PixelCodec

__all__ = [
    "CODECS", "GEOMETRIES", "Codec", "Geometry", "Latents", "PixelCodec", "digest", "geometry", "is_stochastic", "location", "make",
    "weights_folder",
]  # fmt: skip
