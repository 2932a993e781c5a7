"""Images and masks of `tim sample --image`: opened, checked, and named by digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

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
        if not any(options.extend):
            raise ValueError("--extend 0,0,0,0: adds nothing; give pixels to add at the left, top, right and bottom, one of them above 0")
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
    """The image of a file, read like those of a corpus: upright, sRGB, 8 bits, on white; a mask on black. Raises ValueError."""
    from pipeline.images.decode import WHITE, read_image  # its decoders take long to import
    from pipeline.images.rejection import Rejection

    try:
        content = path.read_bytes()
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ValueError(f"{option} {path}: {why}; give an image file") from None
    try:
        found = read_image(content, max_decode_pixels=MAX_PIXELS, background=WHITE if mode == "RGB" else (0, 0, 0))
    except Rejection as error:
        if error.reason == "too-large":
            raise ValueError(f"{option} {path}: has more than 4096x4096 pixels; make it smaller") from error
        raise ValueError(f"{option} {path}: cannot be read as an image ({error}); give a PNG, JPEG, WebP or AVIF file") from error
    return Image.fromarray(found.pixels).convert(mode)
