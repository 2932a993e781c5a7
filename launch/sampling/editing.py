"""Images to edit and their masks: decoded, checked, and named by digest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from launch.arguments import check_sides
from pipeline.digests import bytes_digest
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
    image = _read(options.image, option="--image")
    mask = None if options.mask is None else _read(options.mask, option="--mask")
    edit = edit_of(
        image_of_bytes(image, named=f"--image {options.image}"),
        None if mask is None else mask_of_bytes(mask, named=f"--mask {options.mask}"),
        extend=options.extend,
        strength=options.strength,
        feather=options.feather,
        prefix="--",
    )
    return OpenedEdit(edit, bytes_digest(image), None if mask is None else bytes_digest(mask), options.extend)


def edit_of(
    image: Image.Image,
    mask: Image.Image | None,
    *,
    extend: tuple[int, int, int, int] | None,
    strength: float | None,
    feather: int,
    prefix: str = "",
) -> Edit:
    """The edit of an RGB image, with an L mask or borders. prefix: of the options' names in messages.

    Raises ValueError for a mask and borders together, a mask of another size, and a value out of its range.
    """
    check_sides(image.height, image.width, named=f"{prefix}image")
    if mask is not None and extend is not None:
        raise ValueError(f"{prefix}mask and {prefix}extend exclude each other: extend first, and mask the result")
    if extend is not None:
        if not any(extend):
            raise ValueError(
                f"{prefix}extend 0,0,0,0: adds nothing; give pixels to add at the left, top, right and bottom, one of them above 0"
            )
        left, top, right, bottom = extend
        if (image.width + left + right) * (image.height + top + bottom) > MAX_PIXELS:
            raise ValueError(f"{prefix}extend {','.join(map(str, extend))}: the image would exceed 4096x4096 pixels")
        check_sides(image.height + top + bottom, image.width + left + right, named=f"{prefix}extend {','.join(map(str, extend))}")
        edit = outpainting(image, left=left, top=top, right=right, bottom=bottom, feather=feather)
    else:
        default = STRENGTH if mask is None else 1.0
        edit = Edit(image, mask, strength=default if strength is None else strength, feather=feather)
    edit.checked_size(None, None)
    return edit


def image_of_bytes(data: bytes, *, named: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a file, upright RGB; transparency is composited on white. named: in messages. Raises ValueError."""
    from pipeline.images import read_image  # its decoders take long to import

    with _rejections_named(named, max_pixels=max_pixels):
        return Image.fromarray(read_image(data, max_decode_pixels=max_pixels).pixels)


def mask_of_bytes(data: bytes, *, named: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The mask of a file, upright L; transparent pixels count as black. named: in messages. Raises ValueError."""
    from pipeline.images.masks import read_mask

    with _rejections_named(named, max_pixels=max_pixels):
        return Image.fromarray(read_mask(data, max_decode_pixels=max_pixels))


@contextmanager
def _rejections_named(named: str, *, max_pixels: int) -> Iterator[None]:
    from pipeline.images import Rejection

    try:
        yield
    except Rejection as error:
        if error.reason == "too-large":
            raise ValueError(f"{named}: has more than {max_pixels:,} pixels; make it smaller") from error
        raise ValueError(f"{named}: cannot be read as an image ({error}); give a PNG, JPEG, WebP or AVIF file") from error


def _read(path: Path, *, option: str) -> bytes:
    """The bytes of a file. Raises ValueError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{option} {path}: no such file; give an image file") from None
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be read ({error.strerror})") from error
