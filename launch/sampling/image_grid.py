"""Labelled grids: of images of different sizes, and pages of thumbnails of image files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GAP = 12
FONT_SIZE = 16
LABEL_CHARACTERS = 28
LABEL_LINES = 8  # a longer label is cut
SMALL = 160  # images with a longest side below this are enlarged for viewing
LARGEST_GRID = 6144  # pixels per side; a larger grid is scaled down
THUMBNAIL = 256  # pixels of the longer side
COLUMNS = 10  # thumbnails side by side
PER_PAGE = 100  # thumbnails
MISSING = (225, 225, 225)  # colour in place of an image that is missing


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
    labels = [_wrapped(label, lines=LABEL_LINES) for label in row_labels]
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


def grid_pages(files: Sequence[Sequence[Path | None]], *, row_labels: Sequence[str], column_labels: Sequence[str]) -> Iterator[Image.Image]:
    """Pages with thumbnails of `files[row][column]`, at most `PER_PAGE` each; None and missing files are grey.

    Memory is that of one page and one image, whatever the number of files. The rows of many columns go on on further pages.

    Raises:
        ValueError: as `grid`.
    """
    across = min(COLUMNS, len(column_labels)) or 1
    for top in range(0, len(files), PER_PAGE // across):
        rows = slice(top, top + PER_PAGE // across)
        for left in range(0, len(column_labels), across):
            columns = slice(left, left + across)
            thumbnails = [[_thumbnail(file) for file in row[columns]] for row in files[rows]]
            yield grid(thumbnails, row_labels=row_labels[rows], column_labels=column_labels[columns])


def sheet_pages(files: Sequence[Path | None], *, labels: Sequence[str]) -> Iterator[Image.Image]:
    """Pages with thumbnails in reading order, each above its own label, like `grid_pages`.

    Raises:
        ValueError: a wrong number of labels.
    """
    cells = list(zip(files, labels, strict=True))
    across = min(COLUMNS, len(cells))
    for start in range(0, len(cells), PER_PAGE):
        page = [_captioned(_thumbnail(file), label) for file, label in cells[start : start + PER_PAGE]]
        page += [Image.new("RGB", (1, 1), "white")] * (-len(page) % across)
        rows = [page[first : first + across] for first in range(0, len(page), across)]
        yield grid(rows, row_labels=[""] * len(rows), column_labels=[""] * across)


def _thumbnail(file: Path | None) -> Image.Image:
    """At most `THUMBNAIL` pixels a side. Images below `SMALL` pixels are enlarged by a whole number."""
    if file is None or not file.exists():
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), MISSING)
    with Image.open(file) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return _resized(image, float(-(-SMALL // max(image.size))) if max(image.size) < SMALL else 1.0)


def _captioned(thumbnail: Image.Image, label: str) -> Image.Image:
    """The thumbnail above its label."""
    font = ImageFont.load_default(size=FONT_SIZE)
    text = _wrapped(_printable(label), lines=LABEL_LINES)
    height, width = _text_size(text, font)
    cell = Image.new("RGB", (max(thumbnail.width, width), thumbnail.height + GAP + height), "white")
    cell.paste(thumbnail, (0, 0))
    ImageDraw.Draw(cell).multiline_text((0, thumbnail.height + GAP // 2), text, fill="black", font=font)
    return cell


def _wrapped(label: str, *, lines: int) -> str:
    """The label in lines of at most `LABEL_CHARACTERS`, cut after so many of them."""
    short = label[: 2 * lines * LABEL_CHARACTERS]
    wrapped = [part for line in short.splitlines() for part in textwrap.wrap(line, LABEL_CHARACTERS)]
    is_cut = len(wrapped) > lines or len(short) < len(label)
    return "\n".join([*wrapped[: lines - 1], "…"] if is_cut else wrapped)


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
