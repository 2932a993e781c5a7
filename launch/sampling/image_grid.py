"""Labelled grid of images of different sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

GAP = 12
FONT_SIZE = 16
LABEL_CHARACTERS = 28
SMALL = 160  # images with a longest side below this are enlarged for viewing
LARGEST_GRID = 6144  # pixels per side; a larger grid is scaled down


def grid(images: Sequence[Sequence[Image.Image]], *, row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Arrange `images[row][column]` on white, with row labels on the left and column labels on top. Returns an RGB image.

    Cells have the height of the tallest image in their row and the width of the widest in their column. All images have the same scale:
    enlarged by an integer factor if all are small, reduced if the grid would exceed `LARGEST_GRID` pixels per side.

    Raises:
        ValueError: no image, rows of different lengths, or a wrong number of labels.
    """
    if not images or not images[0] or any(len(row) != len(images[0]) for row in images):
        raise ValueError("a grid needs at least one image, and the same number of images in every row")
    if len(row_labels) != len(images) or len(column_labels) != len(images[0]):
        raise ValueError(f"a grid of {len(images)} × {len(images[0])} images needs one label for each row and column")

    font = ImageFont.load_default(size=FONT_SIZE)
    row_labels, column_labels = [_printable(label) for label in row_labels], [_printable(label) for label in column_labels]
    labels = ["\n".join(part for line in label.splitlines() for part in textwrap.wrap(line, LABEL_CHARACTERS)) for label in row_labels]
    label_sizes = [_text_size(label, font) for label in labels]
    left = max(width for _, width in label_sizes) + 2 * GAP
    top = max(_text_size(label, font)[0] for label in column_labels) + 2 * GAP

    scale = _scale(images, left=left, top=top)
    cells = [[_resized(image, scale) for image in row] for row in images]
    row_heights = [max(label[0], *(cell.height for cell in row)) for label, row in zip(label_sizes, cells, strict=True)]
    widths = [max(cell.width for cell in column) for column in zip(*cells, strict=True)]
    column_widths = [max(width, _text_size(label, font)[1]) for width, label in zip(widths, column_labels, strict=True)]

    across = left + sum(column_widths) + GAP * len(column_widths)
    down = top + sum(row_heights) + GAP * len(row_heights)
    canvas = Image.new("RGB", (across, down), "white")
    draw = ImageDraw.Draw(canvas)
    x = left
    for label, width in zip(column_labels, column_widths, strict=True):
        draw.text((x + width / 2, GAP), label, fill="black", font=font, anchor="ma")
        x += width + GAP
    y = top
    for label, height, row in zip(labels, row_heights, cells, strict=True):
        draw.multiline_text((GAP, y + height / 2), label, fill="black", font=font, anchor="lm")
        x = left
        for cell, width in zip(row, column_widths, strict=True):
            canvas.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
            x += width + GAP
        y += height + GAP
    return canvas


def _scale(images: Sequence[Sequence[Image.Image]], *, left: int, top: int) -> float:
    longest = max(max(image.size) for row in images for image in row)
    if longest < SMALL:
        return float(-(-SMALL // longest))
    widths = [max(image.width for image in column) for column in zip(*images, strict=True)]
    heights = [max(image.height for image in row) for row in images]
    room_across = (LARGEST_GRID - left - GAP * len(widths)) / sum(widths)
    room_down = (LARGEST_GRID - top - GAP * len(heights)) / sum(heights)
    return min(1.0, max(room_across, 1 / longest), max(room_down, 1 / longest))


def _resized(image: Image.Image, scale: float) -> Image.Image:
    rgb = image.convert("RGB")
    if scale == 1.0:
        return rgb
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return rgb.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _printable(label: str) -> str:
    """Replace ×, which Pillow's default font does not have."""
    return label.replace("×", "x")


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """(height, width) in pixels."""
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(bottom - top) + 4, int(right - left) + 1
