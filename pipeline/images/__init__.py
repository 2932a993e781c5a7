"""Bytes → upright 8-bit sRGB pixels, or a named rejection: the one normaliser of the project.

`read_image` decodes every pixel, which is how corpora are prepared; `load_image` decodes no more than its target size needs, which is
how training reads them. The header of every file is checked before a decoder sees it. JPEG goes through libjpeg-turbo without Pillow's
copies (simplejpeg), all else through Pillow; resizing is torch's.
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
