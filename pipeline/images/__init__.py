"""Bytes → upright 8-bit sRGB pixels, or a rejection with its reason. The only image decoder of the project.

`read_image` decodes every pixel, for preparing corpora; `load_image` decodes only as much as the target size needs, for training. Every
header is checked before a decoder sees it. JPEG is decoded by libjpeg-turbo without Pillow's copies (simplejpeg), other formats by
Pillow; torch resizes.
"""

from pipeline.images.decode import WHITE, DecodedImage, read_image
from pipeline.images.encode import ImageFormat, Pixels, encode_image
from pipeline.images.opening import exif_orientation
from pipeline.images.rejection import MAX_DECODE_PIXELS, REASONS, Rejection
from pipeline.images.target_size import load_image

__all__ = [
    "MAX_DECODE_PIXELS",
    "REASONS",
    "WHITE",
    "DecodedImage",
    "ImageFormat",
    "Pixels",
    "Rejection",
    "encode_image",
    "exif_orientation",
    "load_image",
    "read_image",
]
