"""Results of a header check that the decoder does not report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Encoding:
    """Colour encoding of 8-bit RGB levels without an ICC profile.

    `primaries`: x and y of red, green, blue and white (CIE 1931). `transfer`: an exponent (linear light = level ** exponent), or "srgb".
    """

    primaries: tuple[float, float, float, float, float, float, float, float]
    transfer: float | Literal["srgb"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A file with a checked header.

    `data` is the input of the decoder; `info` is added to Pillow's `info` after opening; `encoding` is set if it is not sRGB;
    `overrides_profile`: it takes precedence over an ICC profile; `aperture` = (left, top, width, height) is the visible part of the stored
    pixels; `animated` and `size` = (height, width) as stored are set if the header tells; `refusal` is the reason if a decoder rejects an
    intact file.
    """

    data: bytes | memoryview
    info: Mapping[str, Any] = field(default_factory=dict)
    encoding: Encoding | None = None
    overrides_profile: bool = False
    aperture: tuple[int, int, int, int] | None = None
    animated: bool | None = None
    size: tuple[int, int] | None = None
    refusal: str = ""
