"""What `tim eval` is asked for, apart from the models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_IMAGES = 512
LEAST_IMAGES = 8  # for an interval
DEFAULT_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options that decide which images are drawn, and what is measured of them.

    guidances: the model's if empty; images: for each setting, None: the default, or all if the corpus has fewer; max_pixels: limit of an
    image; features: texts of `tim.metrics.extractors.make_extractor`; metrics: names, all that fit if empty; clip: the model of the CLIP
    score; memorised: training images in which to look for copies, 0: none; resamples: for intervals.
    """

    corpus: str
    out: Path
    steps: tuple[int, ...] = DEFAULT_STEPS
    guidances: tuple[float, ...] = ()
    images: int | None = None
    seed: int = 0
    max_pixels: int | None = None
    features: tuple[str, ...] = ("pixels",)
    metrics: tuple[str, ...] = ()
    clip: str | None = None
    memorised: int = 2048
    resamples: int = 64
    save_images: bool = False

    @property
    def count(self) -> int:
        """Number of images to draw for each setting, if the corpus has so many."""
        return DEFAULT_IMAGES if self.images is None else self.images
