"""Rules on a picture's size, each with a named reason."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FilterConfig(BaseModel):
    """Sides in pixels of the upright picture; aspect = longer side / shorter side; pixels = height · width."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side: int = Field(default=16, ge=1)
    max_aspect: float = Field(default=8.0, ge=1.0)
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)


def size_rejection(height: int, *, width: int, config: FilterConfig) -> tuple[str, str] | None:
    """The (reason, detail) for which a picture of this size is rejected, None if it passes."""
    shorter, longer, pixels = min(height, width), max(height, width), height * width
    size = f"{width}x{height}"
    if shorter < config.min_side:
        return "too-small", f"{size}, sides of {config.min_side} px are asked for"
    if longer > config.max_aspect * shorter:
        return "aspect", f"{size} is {longer / shorter:.4g}:1, the limit is {config.max_aspect:g}:1"
    if config.min_pixels is not None and pixels < config.min_pixels:
        return "filter:min-pixels", f"{size} is {pixels} pixels, {config.min_pixels} are asked for"
    if config.max_pixels is not None and pixels > config.max_pixels:
        return "filter:max-pixels", f"{size} is {pixels} pixels, the limit is {config.max_pixels}"
    return None
