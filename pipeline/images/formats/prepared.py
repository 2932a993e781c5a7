"""What the header of an image file says beyond what its decoder reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Encoding:
    """How 8-bit RGB levels mean colours, where no ICC profile says it.

    `primaries`: x and y of red, green, blue and white (CIE 1931). `transfer`: an exponent (linear light = level ** exponent), or "srgb".
    """

    primaries: tuple[float, float, float, float, float, float, float, float]
    transfer: float | Literal["srgb"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A file whose header has been checked.

    `data` is what the decoder is given; `info` goes into Pillow's `info` once it is open; `encoding` is set where it is not sRGB;
    `overrides_profile` says that it counts even where there is an ICC profile; `aperture` = (left, top, width, height) is the part of the
    stored pixels that is shown; `animated` is set where the header says it; `size` = (height, width) as stored, where it is known already;
    `refusal` says why a decoder may refuse it though it is intact.
    """

    data: bytes | memoryview
    info: Mapping[str, Any] = field(default_factory=dict)
    encoding: Encoding | None = None
    overrides_profile: bool = False
    aperture: tuple[int, int, int, int] | None = None
    animated: bool | None = None
    size: tuple[int, int] | None = None
    refusal: str = ""
