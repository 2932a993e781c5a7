"""Any colour mode and profile to RGB in sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from pipeline.images.rejection import Rejection

_SRGB_TOLERANCE = 3  # levels of 255 by which a profile may differ from sRGB and still count as sRGB


def to_rgb(image: Image.Image, *, profile: bytes) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """Any mode → RGB in sRGB, and the alpha channel if there is one: image, alpha, names of the changes made."""
    changes: list[str] = []
    alpha: Image.Image | None = None
    if image.mode.startswith("I"):
        image, alpha = _from_sixteen_bits(image)
        changes.append("16-bit")
    elif image.has_transparency_data:
        if image.mode == "P":
            changes.append("palette")
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.convert("RGB")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGB")
        changes.append("palette")
    elif image.mode == "1":
        image = image.convert("L")

    if image.mode in ("L", "CMYK"):
        changes.append("grayscale" if image.mode == "L" else "cmyk")
    elif image.mode == "F":
        raise Rejection("not-an-image", detail="its levels are floating-point numbers, which say nothing of black and white")
    elif image.mode != "RGB":
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise Rejection("not-an-image", detail=f"colour mode {image.mode} has no sRGB equivalent") from error
        changes.append("colour-space")
    if not profile:
        return _as_rgb(image), alpha, changes

    transform = to_srgb(profile, mode=image.mode)
    if transform == "unusable" and image.mode == "L":  # an RGB profile on a gray image
        image = image.convert("RGB")
        transform = to_srgb(profile, mode="RGB")
    if isinstance(transform, ImageCms.ImageCmsTransform):
        image = transform.apply(image)
        changes.append("icc-to-srgb")
    elif transform == "unusable":
        changes.append("icc-ignored")
    return _as_rgb(image), alpha, changes


def _as_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # Pillow would copy it


def _from_sixteen_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit gray → 8-bit gray by v / 257, rounded; the one transparent level of a PNG → alpha. (16-bit RGB arrives as its high bytes.)"""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Rejection("not-an-image", detail=f"its levels go from {levels.min()} to {levels.max()}, which is no picture's range")
    scaled = (levels * 255 + 32895) >> 16
    transparent = image.info.get("transparency")
    alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)) if isinstance(transparent, int) else None
    return Image.fromarray(scaled.astype(np.uint8)), alpha


@lru_cache(maxsize=64)
def to_srgb(profile: bytes, *, mode: str) -> ImageCms.ImageCmsTransform | Literal["srgb", "unusable"]:
    """The transform of a profile to sRGB; "srgb" if it would change nothing that counts; "unusable" if it is broken or not for `mode`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "unusable"
    if mode == "RGB":
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
        seen = np.asarray(transform.apply(Image.fromarray(grid)))
        if np.abs(seen.astype(int) - grid.astype(int)).max() <= _SRGB_TOLERANCE:
            return "srgb"
    return transform
