"""Examine the loss mask of an input: verified, upright, at the size of its stored image, in the spool file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from dataprep.sources.raw_sample import RawMask
from pipeline.errors import one_line
from pipeline.images import DecodedImage, Rejection
from pipeline.images.masks import BadMask, encode_mask, place_mask, read_mask
from pipeline.storage.remote import is_remote, read_ranges

_MAX_BYTES = 1 << 28
_TURNED = "orientation-"  # in `DecodedImage.changes`


def examine_mask(mask: RawMask, *, image: DecodedImage, stored: tuple[int, int], max_decode_pixels: int, spool: BinaryIO) -> dict[str, Any]:
    """The columns of an input's row for its mask, or the reason and detail of a rejection.

    `stored`: (height, width) at which the image is stored; `image`: as it was decoded, not scaled. Raises MemoryError.
    """
    orientation = next((int(change.removeprefix(_TURNED)) for change in image.changes if change.startswith(_TURNED)), 1)
    height, width = image.pixels.shape[:2]
    try:
        data = _read(mask)
        pixels = place_mask(
            read_mask(data, max_decode_pixels=max_decode_pixels), size=(height, width), stored=stored, orientation=orientation
        )
    except OSError as error:
        return _rejected(mask, f"cannot be read: {error.strerror or one_line(error)}")
    except BadMask as error:
        return _rejected(mask, str(error))
    except Rejection as rejection:
        if isinstance(rejection.__cause__, MemoryError):
            raise MemoryError from rejection  # of this process: the pool decides about the input
        return _rejected(mask, f"cannot be used: {rejection}")
    start = spool.tell()
    length = spool.write(encode_mask(pixels))
    name = mask.name.encode("utf-8", "backslashreplace").decode("utf-8")
    return {"mask_path": name, "mask_file": os.fsencode(Path(spool.name).name), "mask_start": start, "mask_bytes": length}


def _rejected(mask: RawMask, detail: str) -> dict[str, Any]:
    return {"reason": "bad-record", "detail": f"its mask {mask.name} {detail}".encode("utf-8", "backslashreplace").decode("utf-8")}


def _read(mask: RawMask) -> bytes:
    """The bytes of a mask. Raises OSError."""
    if mask.data is not None:
        return mask.data
    if is_remote(mask.file):
        (answer,) = read_ranges([(mask.file, mask.offset, None if mask.length is None else mask.offset + mask.length)])
        if isinstance(answer, OSError):
            raise answer
        return bytes(answer)
    with open(mask.file, "rb") as stream:
        stream.seek(mask.offset)
        return stream.read(_MAX_BYTES if mask.length is None else min(mask.length, _MAX_BYTES))
