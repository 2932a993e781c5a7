"""The embedded corpus: captioned images of one shape on a plain background, drawn from a seed, and a reader of such images.

Shape and colours can be read back from an image, so generated images can be scored against their prompts without another model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pipeline.storage.atomic import publish_text

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (245, 215, 50),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
# Outlines in a box from −1 to 1, x to the right and y down.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": tuple((math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64, endpoint=False)),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (1, 1), (-1, 1)),
    "cross": (
        (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
        (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
    ),
}  # fmt: skip
SUPERSAMPLING = 4
SMALLEST_SIDE = 16  # pixels
LARGEST_ASPECT = 3.0  # long side / short side
LARGEST_RADIUS = 12.0  # of a figure, in pixels; in thin images 40 % of the shorter side
STRAY = 0.1  # largest offset of a figure from the centre, as a share of the free space
SPECKLE = 4  # side in pixels of the squares of a speckled background
PALENESS = 0.35  # share of grey in the pale squares
GREY = 128


@dataclass(frozen=True, slots=True)
class Figure:
    """Content of an image, or of a prompt; None for what cannot be read."""

    shape: str | None
    colour: str | None
    ground: str | None

    @property
    def caption(self) -> str:
        """Such as "a red circle on blue"."""
        return f"a {self.colour} {self.shape} on {self.ground}"


def figures(shapes: Sequence[str] = tuple(SHAPES)) -> list[Figure]:
    """All figures of the corpus: each shape in each colour on each other colour."""
    return [Figure(shape, colour, ground) for shape in shapes for colour in COLOURS for ground in COLOURS if colour != ground]


def draw(figure: Figure, *, height: int, width: int, centre: tuple[float, float], radius: float) -> Image.Image:
    """Draw a figure, antialiased. centre: y and x in pixels; radius: half the side of the shape's box in pixels."""
    assert figure.shape is not None, "nothing to draw"
    assert figure.colour is not None, "no colour to draw with"
    assert figure.ground is not None, "no ground to draw on"
    scale = SUPERSAMPLING
    canvas = Image.new("RGB", (width * scale, height * scale), COLOURS[figure.ground])
    outline = [((centre[1] + x * radius) * scale, (centre[0] + y * radius) * scale) for x, y in SHAPES[figure.shape]]
    ImageDraw.Draw(canvas).polygon(outline, fill=COLOURS[figure.colour])
    return canvas.resize((width, height), Image.Resampling.BOX)


def random_view(figure: Figure, *, height: int, width: int, rng: np.random.Generator, speckled: bool = False) -> Image.Image:
    """The figure at a random size and position; speckled: each square of the background is paler with probability one half."""
    radius = _largest_radius(height, width) * rng.uniform(0.92, 1)
    y, x = (side / 2 + rng.uniform(-STRAY, STRAY) * (side / 2 - radius - 1) for side in (height, width))
    image = draw(figure, height=height, width=width, centre=(y, x), radius=radius)
    if not speckled:
        return image
    uncovered = 1 - _template(str(figure.shape), (height, width), centre=(y, x), half=(radius, radius))
    pale = rng.integers(0, 2, (-(-height // SPECKLE), -(-width // SPECKLE))).repeat(SPECKLE, 0).repeat(SPECKLE, 1)[:height, :width]
    share = (PALENESS * pale * uncovered)[..., None]
    return Image.fromarray(np.rint(np.asarray(image) + share * (GREY - np.array(COLOURS[str(figure.ground)]))).astype(np.uint8))


def random_image(
    seed: int,
    index: int,
    *,
    max_side: int = 64,
    shapes: Sequence[str] = tuple(SHAPES),
    speckled: bool = False,
) -> tuple[Image.Image, Figure]:
    """Image number `index` of the corpus with this seed. Figure, size and position depend on the two numbers only.

    The sides of speckled images are multiples of a square.
    """
    rng = np.random.default_rng((seed, index))
    choices = figures(shapes)
    figure = choices[int(rng.integers(len(choices)))]
    aspect = math.exp(rng.uniform(-math.log(LARGEST_ASPECT), math.log(LARGEST_ASPECT)))
    shortest = SMALLEST_SIDE * max(aspect, 1 / aspect)
    long_side = shortest * (max_side / shortest) ** rng.uniform() ** 2  # small images are cheapest, and most frequent
    height, width = (long_side, long_side * aspect) if aspect < 1 else (long_side / aspect, long_side)
    height, width = (int(np.clip(round(side), SMALLEST_SIDE, max_side)) for side in (height, width))
    if speckled:
        height, width = (side // SPECKLE * SPECKLE for side in (height, width))
    return random_view(figure, height=height, width=width, rng=rng, speckled=speckled), figure


def write_corpus(
    folder: Path,
    *,
    count: int,
    seed: int = 0,
    max_side: int = 64,
    shapes: Sequence[str] = tuple(SHAPES),
    speckled: bool = False,
) -> None:
    """Write `count` images as PNG files with a `metadata.jsonl`: a usual image folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        image, figure = random_image(seed, index, max_side=max_side, shapes=shapes, speckled=speckled)
        name = f"{index:06d}.png"
        image.save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": figure.caption}))
    publish_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")


def read_figure(image: Image.Image, *, min_overlap: float = 0.6, max_distance: float = 90.0) -> Figure:
    """Read shape and colours back from an image of any size.

    The background is the colour of most border pixels, the figure the most frequent other colour. The shape is the one whose outline,
    fitted to the figure's box, has the best overlap (intersection over union, at least `min_overlap`). A colour counts only if the mean
    pixel is within `max_distance` (0 to 441) of it. What cannot be read is None. Single stray pixels are ignored.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    border = np.concatenate([nearest[0], nearest[-1], nearest[1:-1, 0], nearest[1:-1, -1]])
    ground = int(np.bincount(border, minlength=len(names)).argmax())
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    counts[ground] = 0
    colour = int(counts.argmax())
    if counts[colour] < 0.02 * nearest.size:
        return Figure(None, None, _close(pixels[nearest == ground], names[ground], max_distance))
    axis = palette[colour] - palette[ground]
    coverage = np.clip((pixels - palette[ground]) @ axis / (axis @ axis), 0, 1)
    return Figure(
        _best_shape(coverage, min_overlap),
        _close(pixels[nearest == colour], names[colour], max_distance),
        _close(pixels[nearest == ground], names[ground], max_distance),
    )


def ground_squares(image: Image.Image) -> NDArray[np.float64]:
    """The background squares that no figure can reach, (n, 4, 4, 3), values from 0 to 255.

    Raises ValueError for an image that is too small to have any.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    rows, columns = image.height // SPECKLE, image.width // SPECKLE
    squares = pixels[: rows * SPECKLE, : columns * SPECKLE].reshape(rows, SPECKLE, columns, SPECKLE, 3).swapaxes(1, 2)
    radius, middle = _largest_radius(image.height, image.width), (image.height / 2, image.width / 2)
    reach = [radius + STRAY * (half - radius - 1) + SPECKLE / 2 - 1 for half in middle]  # squares covered by one pixel count
    away = [
        np.abs((np.arange(count) + 0.5) * SPECKLE - half) >= far for count, half, far in zip((rows, columns), middle, reach, strict=True)
    ]
    free = away[0][:, None] | away[1]
    if free.sum() < 2:
        raise ValueError(f"an image of {image.width}x{image.height} has no background that its figure leaves free")
    return squares[free]


def read_speckles(image: Image.Image, *, ground: str) -> float:
    """Strength of the speckles on a background of this colour: about 1 in speckled images of the corpus, 0 on a plain background.

    The standard deviation of the squares' paleness, relative to that of half pale and half plain squares. Raises as `ground_squares`.
    """
    colour = np.array(COLOURS[ground], dtype=np.float64)
    paleness = (ground_squares(image).mean((1, 2)) - colour) @ (GREY - colour) / ((GREY - colour) @ (GREY - colour))
    return float(paleness.std() / (PALENESS / 2))


def _largest_radius(height: int, width: int) -> float:
    return min(0.4 * min(height, width), LARGEST_RADIUS)


def _close(pixels: np.ndarray, name: str, max_distance: float) -> str | None:
    return name if len(pixels) and np.linalg.norm(pixels.mean(0) - COLOURS[name]) <= max_distance else None


def _best_shape(coverage: np.ndarray, min_overlap: float) -> str | None:
    grey = Image.fromarray((coverage * 255).astype(np.uint8))
    smooth = np.asarray(grey.filter(ImageFilter.MedianFilter(3)), dtype=np.float64) / 255  # removes stray pixels, but also tips
    overlaps = {shape: max(_fit(shape, coverage, within) for within in (coverage, smooth)) for shape in SHAPES}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= min_overlap else None


def _fit(shape: str, coverage: np.ndarray, within: np.ndarray) -> float:
    """Overlap of the coverage with the shape drawn into the bounding box of `within`; 0 if the box is empty or far from square."""
    down, across = _span(within.max(axis=1)), _span(within.max(axis=0))
    if down is None or across is None or max(down[1], across[1]) > 1.6 * min(down[1], across[1]):
        return 0.0
    template = _template(shape, coverage.shape, centre=(down[0], across[0]), half=(down[1], across[1]))
    return float(np.minimum(coverage, template).sum() / np.maximum(coverage, template).sum())


def _span(profile: np.ndarray) -> tuple[float, float] | None:
    """Centre and half length, in pixels, of the filled part of a row or column profile; partly covered pixels count in part."""
    filled = np.flatnonzero(profile > 0.5)
    if not len(filled):
        return None
    start, stop = max(filled[0] - 1, 0), filled[-1] + 2
    covered = profile[start:stop]
    middle = float((covered * (np.arange(start, start + len(covered)) + 0.5)).sum() / covered.sum())
    return middle, float(covered.sum() / 2)


def _template(shape: str, size: tuple[int, ...], *, centre: tuple[float, float], half: tuple[float, float]) -> np.ndarray:
    height, width = size
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    outline = [((centre[1] + x * half[1]) * SUPERSAMPLING, (centre[0] + y * half[0]) * SUPERSAMPLING) for x, y in SHAPES[shape]]
    ImageDraw.Draw(canvas).polygon(outline, fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float64) / 255
