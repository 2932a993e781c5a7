"""The native-size rule: an image's training size, from its own size and the limits of the plan.

An upright image is scaled by at most 1, the same for both sides, so that pixels ≤ `max_pixels` and tokens ≤ `max_tokens`. Then each side
is cropped to a multiple of the stride, by less than one stride. Nothing is upscaled or squashed. `fit="squash"` reproduces the published
recipe instead: the whole image is resized to the multiples, which slightly changes its aspect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pipeline.cost import Ints

KEPT = ""
# The position is the code in `Targets.left_out`.
LEFT_OUT_REASONS = (KEPT, "aspect", "too-small", "no-size", "where", "exclude", "takedown", "validation")


Fit = Literal["crop", "squash"]
Crop = tuple[int, int, int, int]
"""Resized size and centre crop of an image: resize_height, resize_width, height, width."""


@dataclass(frozen=True, slots=True)
class SizeRule:
    """Limits of the native-size rule; `stride` is pixels per token side, `max_aspect` is long / short side of the original image."""

    stride: int
    max_tokens: int
    max_pixels: int | None = None
    min_tokens: int = 1
    max_aspect: float = 8.0
    fit: Fit = "crop"


@dataclass(frozen=True, slots=True)
class Targets:
    """Result of the rule for n images, each (n,) int64: `resize_*` is the size to scale to, `height` and `width` the centre crop of that,
    `left_out` a position in `LEFT_OUT_REASONS` (0 = kept)."""

    resize_height: Ints
    resize_width: Ints
    height: Ints
    width: Ints
    tokens: Ints
    left_out: Ints

    @property
    def crops(self) -> Ints:
        """(n, 4): resize_height, resize_width, height, width."""
        return np.stack([self.resize_height, self.resize_width, self.height, self.width], axis=1)


@dataclass(frozen=True, slots=True)
class Target:
    """Result of the rule for one image; `left_out` is "" or the reason."""

    resize: tuple[int, int]
    height: int
    width: int
    tokens: int
    left_out: str


def target_sizes(heights: ArrayLike, *, widths: ArrayLike, rule: SizeRule) -> Targets:
    """Apply the rule to n upright images of `heights` × `widths` pixels, (n,) each; below 1 if unknown."""
    height, width = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    area = np.maximum(height * width, 1).astype(np.float64)
    largest_area = float(rule.max_tokens * rule.stride**2)
    if rule.max_pixels is not None:
        largest_area = min(largest_area, float(rule.max_pixels))
    scale = np.minimum(1.0, np.sqrt(largest_area / area))
    resize_height, resize_width = _rounded(height, scale=scale), _rounded(width, scale=scale)
    too_large = resize_height * resize_width > largest_area  # rounding up can exceed the limit by half a pixel per side
    resize_height = np.where(too_large, _floored(height, scale=scale), resize_height)
    resize_width = np.where(too_large, _floored(width, scale=scale), resize_width)

    rows, columns = resize_height // rule.stride, resize_width // rule.stride
    tokens = rows * columns
    if rule.fit == "squash":
        resize_height, resize_width = rows * rule.stride, columns * rule.stride
    short, long = np.minimum(height, width), np.maximum(height, width)
    left_out = np.where(tokens < max(rule.min_tokens, 1), LEFT_OUT_REASONS.index("too-small"), 0)
    left_out = np.where(long > rule.max_aspect * short, LEFT_OUT_REASONS.index("aspect"), left_out)
    left_out = np.where(short < 1, LEFT_OUT_REASONS.index("no-size"), left_out)
    return Targets(
        resize_height=resize_height,
        resize_width=resize_width,
        height=rows * rule.stride,
        width=columns * rule.stride,
        tokens=tokens,
        left_out=left_out,
    )


def target_size(height: int, *, width: int, rule: SizeRule) -> Target:
    """Apply the rule to one upright image."""
    targets = target_sizes([height], widths=[width], rule=rule)
    return Target(
        resize=(int(targets.resize_height[0]), int(targets.resize_width[0])),
        height=int(targets.height[0]),
        width=int(targets.width[0]),
        tokens=int(targets.tokens[0]),
        left_out=LEFT_OUT_REASONS[targets.left_out[0]],
    )


def _rounded(sides: Ints, *, scale: np.ndarray) -> Ints:
    return np.minimum(np.rint(sides * scale).astype(np.int64), sides)


def _floored(sides: Ints, *, scale: np.ndarray) -> Ints:
    return np.floor(sides * scale * (1 + 1e-12)).astype(np.int64)  # an integer product may be rounded to just below
