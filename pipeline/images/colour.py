"""Convert any colour mode and profile to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from pipeline.images.formats.checked_header import Encoding
from pipeline.images.formats.cicp import to_srgb_levels
from pipeline.images.rejection import unsupported

_SRGB_TOLERANCE = 3  # levels of 255 by which a profile may differ from sRGB and still count as sRGB


def to_rgb(image: Image.Image, *, profile: bytes, encoding: Encoding | None) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """Convert any mode to sRGB. Returns the image, its alpha channel if it has one, and the names of the changes.

    `encoding` is used if there is no profile. Raises `Rejection`.
    """
    image, alpha, changes = _split(image)
    if image.mode == "LAB":
        return _lab_transform().apply(image), alpha, [*changes, "colour-space"]
    if image.mode in ("L", "CMYK"):
        changes.append("grayscale" if image.mode == "L" else "cmyk")
    elif image.mode != "RGB":
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise unsupported(f"colour mode {image.mode} has no sRGB equivalent") from error
        changes.append("colour-space")
    if profile:
        image, applied = _apply_profile(image, profile=profile)
        return image, alpha, [*changes, *applied]
    image = _as_rgb(image)
    if encoding is not None:
        image = Image.fromarray(to_srgb_levels(np.asarray(image), encoding))
        changes.append("colours-to-srgb")
    return image, alpha, changes


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """Split into an image without alpha, its alpha, and the names of the changes. Gray stays gray, because its profile needs it."""
    if image.mode == "F":
        raise unsupported("its levels are floating-point numbers without a defined black and white")
    if image.mode.startswith("I"):
        gray, alpha = _from_sixteen_bits(image)
        return gray, alpha, ["16-bit"]
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode == "1":
        image = image.convert("L")
    if image.mode in ("P", "PA"):
        has_alpha = image.mode == "PA" or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
        return (image.convert("RGB"), image.getchannel("A"), ["palette"]) if has_alpha else (image, None, ["palette"])
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A"), []
    if image.mode == "RGBA":
        return image.convert("RGB"), image.getchannel("A"), []
    transparent = image.info.get("transparency")
    if image.mode in ("L", "RGB") and isinstance(transparent, int | tuple):
        return image, _alpha_of(np.asarray(image), transparent), []
    return image, None, []


def _alpha_of(levels: np.ndarray, transparent: int | tuple[int, ...]) -> Image.Image:
    """Alpha from (H, W) or (H, W, 3) levels and the transparent level."""
    matches = levels == np.asarray(transparent)
    return Image.fromarray(np.where(matches if matches.ndim == 2 else matches.all(axis=-1), 0, 255).astype(np.uint8))


def _as_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy it


def _from_sixteen_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit gray → 8-bit gray by v / 257, rounded, and alpha from a PNG's transparent level. (16-bit RGB arrives as its high bytes.)"""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise unsupported(f"its levels range from {levels.min()} to {levels.max()}, outside 0 to 65535")
    scaled = (levels * 255 + 32895) >> 16
    transparent = image.info.get("transparency")
    return Image.fromarray(scaled.astype(np.uint8)), _alpha_of(levels, transparent) if isinstance(transparent, int) else None


def _apply_profile(image: Image.Image, *, profile: bytes) -> tuple[Image.Image, list[str]]:
    transform = to_srgb(profile, mode=image.mode)
    if transform == "unusable" and image.mode == "L":  # an RGB profile on a gray image
        image = image.convert("RGB")
        transform = to_srgb(profile, mode="RGB")
    if isinstance(transform, ImageCms.ImageCmsTransform):
        return transform.apply(image), ["icc-to-srgb"]
    return _as_rgb(image), ["icc-ignored"] if transform == "unusable" else []


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, *, mode: str) -> ImageCms.ImageCmsTransform | Literal["srgb", "unusable"]:
    """The transform from a profile to sRGB; "srgb" if the difference is negligible; "unusable" if it is broken or does not fit `mode`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "unusable"
    if mode == "RGB":
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        converted = np.asarray(transform.apply(Image.fromarray(grid)))
        if np.abs(converted.astype(int) - grid.astype(int)).max() <= _SRGB_TOLERANCE:
            return "srgb"
    return transform


@lru_cache(maxsize=1)
def _lab_transform() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
