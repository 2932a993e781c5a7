"""Image formats of samples: PNG, JPEG, WebP and AVIF, their options and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import features

PNG_LEVEL = 3  # of zlib: about 60 % of the time of Pillow's 6, files about 14 % larger
AVIF_SPEED = 8  # of 0 to 10: at most two thirds of the time of Pillow's 6, files 14 to 24 % larger
QUALITIES = {"jpeg": 95, "webp": 90, "avif": 85}
_SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".avif": "avif"}
_NAMES = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp", "avif": ".avif"}
_MAX_SIDES = {"jpeg": 65_500, "webp": 16_383, "avif": 65_536}  # pixels


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """A format of image files. quality: 1 to 100, None where nothing is lost."""

    name: str
    suffix: str
    quality: int | None
    lossless: bool

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError if a side, in pixels, is longer than the format can store."""
        limit = _MAX_SIDES.get(self.name)
        if limit is not None and max(width, height) > limit:
            stores = f"{self.name} stores at most {limit:,} pixels a side, not {width}x{height}"
            raise ValueError(f"--format {self.name}: {stores}; use --format png")

    def save_options(self) -> dict[str, Any]:
        """The arguments of `PIL.Image.Image.save`. Colours are not subsampled in JPEG."""
        if self.name == "png":
            return {"format": "PNG", "compress_level": PNG_LEVEL}
        if self.name == "jpeg":
            return {"format": "JPEG", "quality": self.quality, "subsampling": "4:4:4"}
        if self.name == "webp":
            return {"format": "WEBP", "lossless": self.lossless, "quality": 50 if self.lossless else self.quality, "exact": self.lossless}
        return {"format": "AVIF", "quality": self.quality, "speed": AVIF_SPEED}


def image_format(name: str | None = None, *, path: Path | None = None, quality: int | None = None, lossless: bool = False) -> ImageFormat:
    """The format of `--format NAME`, or else of a path's suffix, or else PNG.

    Args:
        quality: 1 to 100; None: `QUALITIES` of the format.
        lossless: of WebP; PNG always is, JPEG and Pillow's AVIF, which converts colours, never are.

    Raises:
        ValueError: an unknown format, a name and a suffix that differ, a quality out of range, an option that the format does not have, or
            a format that this build of Pillow lacks.
    """
    known = "png, jpeg, webp or avif"
    given = None if name is None else name.lower().removeprefix(".")
    if given is not None and given not in _NAMES:
        raise ValueError(f"--format {name}: expected {known}")
    suffix = "" if path is None else path.suffix.lower()
    if path is not None and suffix not in _SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends with .png, .jpg, .webp or .avif")
    chosen = _SUFFIXES[_NAMES[given]] if given is not None else _SUFFIXES.get(suffix, "png")
    if path is not None and _SUFFIXES[suffix] != chosen:
        raise ValueError(f"--format {name}: {path} ends with {suffix}; give one of them")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"--quality {quality}: expected 1 to 100")
    if lossless and chosen in ("jpeg", "avif"):
        raise ValueError(f"--lossless: {chosen} always loses something; use --format png or webp")
    if quality is not None and (chosen == "png" or lossless):
        raise ValueError(f"--quality {quality}: {'png' if chosen == 'png' else '--lossless'} loses nothing; leave it out")
    if chosen in ("webp", "avif") and not features.check(chosen):
        raise ValueError(f"--format {chosen}: this build of Pillow cannot write it; use another format, or pip install --upgrade pillow")
    is_lossless = lossless or chosen == "png"
    return ImageFormat(
        name=chosen,
        suffix=suffix or _NAMES[given or chosen],
        quality=None if is_lossless else quality or QUALITIES[chosen],
        lossless=is_lossless,
    )
