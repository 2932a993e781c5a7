"""Images and masks of `tim sample --image`: opened, checked, and named by digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.digests import file_digest
from tim.sampling.edits import FEATHER, Edit, outpainting
from tim.sampling.requests import MAX_PIXELS

STRENGTH = 0.6  # of image to image; masked and added parts start from noise


@dataclass(frozen=True, slots=True)
class EditOptions:
    """Options of image to image, inpainting and outpainting.

    image, mask: files; extend: pixels to add at the left, top, right and bottom. strength: None for the default of the kind of edit.
    """

    image: Path
    mask: Path | None = None
    extend: tuple[int, int, int, int] | None = None
    strength: float | None = None
    feather: int = FEATHER


@dataclass(frozen=True, slots=True)
class OpenedEdit:
    """An edit, and what an image's file records of it: the sha256 of the image and the mask."""

    edit: Edit
    image: str
    mask: str | None
    extend: tuple[int, int, int, int] | None


def open_edit(options: EditOptions) -> OpenedEdit:
    """Open the files. Raises ValueError for one that is missing or no image, and for options that exclude each other."""
    if options.mask is not None and options.extend is not None:
        raise ValueError("--mask and --extend exclude each other: extend first, and mask the result")
    image = _opened(options.image, option="--image", mode="RGB")
    mask = None if options.mask is None else _opened(options.mask, option="--mask", mode="L")
    if options.extend is not None:
        left, top, right, bottom = options.extend
        if (image.width + left + right) * (image.height + top + bottom) > MAX_PIXELS:
            raise ValueError(f"--extend {','.join(map(str, options.extend))}: the image would exceed 4096x4096 pixels")
        edit = outpainting(image, left=left, top=top, right=right, bottom=bottom, feather=options.feather)
    else:
        strength = options.strength if options.strength is not None else STRENGTH if mask is None else 1.0
        edit = Edit(image, mask, strength=strength, feather=options.feather)
    edit.checked_size(None, None)
    digest = None if options.mask is None else file_digest(options.mask)
    return OpenedEdit(edit, file_digest(options.image), digest, options.extend)


def _opened(path: Path, *, option: str, mode: str) -> Image.Image:
    """The image of a file, upright. Raises ValueError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{option} {path}: has {image.width}x{image.height} pixels, the limit is 4096x4096")
            return ImageOps.exif_transpose(image).convert(mode)
    except FileNotFoundError:
        raise ValueError(f"{option} {path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{option} {path}: cannot be read as an image; give a PNG, JPEG, WebP or AVIF file") from error
