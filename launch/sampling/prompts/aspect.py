"""Sizes from an aspect ratio and a number of megapixels: `--aspect 21:9 --megapixels 4`."""

from __future__ import annotations

import math
import re

from launch.arguments import MAX_PIXELS, check_sides

MEGAPIXEL = 1024 * 1024  # pixels, as in ComfyUI: 1 is 1024 x 1024 at 1:1, 16 is the largest size
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*[:/]\s*(\d+(?:\.\d+)?)", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_EXTREME = 4096.0  # width by height, or height by width


def parse_aspect(text: str, *, option: str = "--aspect") -> float:
    """`"21:9"`, `"21/9"` or `"2.33"` → width by height.

    Raises:
        ValueError: invalid syntax, or not between 1:4096 and 4096:1.
    """
    match = _RATIO.fullmatch(text.strip())
    if match is not None:
        width, height = float(match[1]), float(match[2])
    elif _NUMBER.fullmatch(text.strip()):
        width, height = float(text), 1.0
    else:
        raise ValueError(f"{option} {text}: expected WIDTH:HEIGHT or a number, for example 21:9")
    if not width or not height or not 1 / _EXTREME <= width / height <= _EXTREME:
        raise ValueError(f"{option} {text}: expected a ratio between 1:{_EXTREME:g} and {_EXTREME:g}:1")
    return width / height


def size_of_aspect(aspect: float, *, megapixels: float, option: str = "--megapixels") -> tuple[int, int]:
    """(height, width) in pixels of about `megapixels` · 1024² pixels whose width by height is about `aspect`.

    Width is √(pixels · aspect) and height √(pixels / aspect), each rounded to the nearest pixel and at least 1. If that exceeds the largest
    size, 4096², the longer side is shortened until it does not. Each side is within half a pixel otherwise.

    Raises:
        ValueError: megapixels is not a number above 0 and up to 16.
    """
    if not math.isfinite(megapixels) or not 0 < megapixels * MEGAPIXEL <= MAX_PIXELS:
        most = MAX_PIXELS / MEGAPIXEL
        raise ValueError(f"{option} {megapixels:g}: expected a number above 0 and up to {most:g} (1 is 1024 x 1024 pixels)")
    pixels = megapixels * MEGAPIXEL
    width, height = max(1, round(math.sqrt(pixels * aspect))), max(1, round(math.sqrt(pixels / aspect)))
    if width * height > MAX_PIXELS:
        width, height = (MAX_PIXELS // height, height) if width >= height else (width, MAX_PIXELS // width)
    return height, width


def checked_size(aspect: str, *, megapixels: float, names: tuple[str, str] = ("--aspect", "--megapixels")) -> tuple[int, int]:
    """(height, width) as `size_of_aspect`, for an aspect ratio as typed. names: those of both options, for messages.

    Raises ValueError naming the option also if a side of the image is too long.
    """
    height, width = size_of_aspect(parse_aspect(aspect, option=names[0]), megapixels=megapixels, option=names[1])
    check_sides(height, width, named=f"{names[0]} {aspect} with {names[1]} {megapixels:g}")
    return height, width
