"""Pass 1: examine inputs, one row per input.

An image whose bytes cannot be kept is encoded once, into a spool file; an image that cannot be read again is copied there. Workers examine
pieces of 32 inputs, or fewer if these hold many bytes. Rows are stored by `row_chunks.py`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageColor
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dataprep.dedup.perceptual import perceptual_hash
from dataprep.examine.captions import LANGUAGE, CaptionConfig, prepare_captions
from dataprep.examine.filters import FilterConfig, Filters, Subject
from dataprep.examine.masks import examine_mask
from dataprep.examine.thumbnails import thumbnail
from dataprep.row_schema import SCALED_DOWN
from dataprep.sources.raw_sample import RawSample
from pipeline.errors import one_line
from pipeline.images import MAX_DECODE_PIXELS, DecodedImage, Rejection, encode_image, read_image
from pipeline.storage.atomic import process_name
from pipeline.storage.remote import is_remote, read_ranges

PIECE_SIZE, PIECE_BYTES = 32, 32 << 20
_URLS_AT_ONCE = 16
MAX_IMAGE_BYTES = 1 << 30
_CRASHED = "the decoder took its process down, or wanted more memory than a worker may take, twice"
_LACK_OF_MEMORY = ("insufficient memory", "out of memory", "not enough memory")
_MAX_STORED_SIDE = {"jpg": 65_500, "png": 2**31 - 1, "webp": 16_383}


class ImageConfig(BaseModel):
    """`format`: the image format of the corpus. `max_decode_pixels`: larger images are rejected by their header.

    `background`: the colour behind transparent pixels, a name or "#rrggbb". `max_pixels`, `max_side`: larger images are scaled down to fit,
    with their aspect ratio; filters see the original size. By default no image is scaled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["jpg", "png", "webp"] = "jpg"
    max_decode_pixels: int = Field(default=MAX_DECODE_PIXELS, ge=1)
    background: str = "white"
    max_pixels: int | None = Field(default=None, ge=1)
    max_side: int | None = Field(default=None, ge=1)

    @field_validator("background")
    @classmethod
    def _check_background(cls, background: str) -> str:
        if len(ImageColor.getrgb(background)) != 3:
            raise ValueError(f"background {background} is transparent itself")
        return background

    @property
    def background_levels(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of this size is stored."""
        rows, columns = height, width
        if self.max_side is not None and max(height, width) > self.max_side:
            rows, columns = (max(1, side * self.max_side // max(height, width)) for side in (height, width))
        if self.max_pixels is not None and rows * columns > self.max_pixels:
            rows = max(1, math.isqrt(self.max_pixels * height // width))
            columns = max(1, min(math.isqrt(self.max_pixels * width // height), self.max_pixels // rows))
            rows = min(rows, self.max_pixels // columns)
        return rows, columns


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that apply to a single input."""

    images: ImageConfig
    captions: CaptionConfig
    filters: FilterConfig
    hashes: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A task: inputs of the chunk that is written to `table`. `suspects`: indices of inputs at which a worker died; `crashed`: at which two
    died, which are not opened again."""

    samples: tuple[RawSample, ...]
    table: Path
    ends_chunk: bool
    rules: Rules
    suspects: frozenset[int] = frozenset()
    crashed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ExaminedPiece:
    """The rows of a piece, of `row_chunks.CHUNK_SCHEMA`."""

    rows: list[dict[str, Any]]
    table: Path
    ends_chunk: bool


def examine_piece(piece: Piece, report: Callable[[int], None]) -> ExaminedPiece:
    """Examine the inputs of a piece. Re-encoded images are written to the process's spool file beside the table."""
    rows: list[dict[str, Any]] = []
    shown: set[str] = set()
    filters = Filters(piece.rules.filters)
    with open(piece.table.parent / f"spool-{process_name()}.bin", "ab") as spool:
        at_once = 1 if piece.suspects else _URLS_AT_ONCE  # so that a crash during a download has one suspect
        fetched: dict[int, bytes | OSError] = {}
        for index, sample in enumerate(piece.samples):
            report(index)
            if index % at_once == 0:
                due = range(index, min(index + at_once, len(piece.samples)))
                fetched = _fetch({i: piece.samples[i] for i in due if i not in piece.crashed})
            answer = fetched.pop(index, None)
            if isinstance(answer, OSError):
                sample = replace(sample, reason="missing", detail=one_line(answer))
            elif answer is not None:
                sample = replace(sample, data=answer)
            if index in piece.crashed:
                rows.append({**_blank_row(sample), "reason": "crashed", "detail": _CRASHED})
            else:
                rows.append(examine(sample, rules=piece.rules, filters=filters, spool=spool, shown=shown))
        if any(row["is_spooled"] or row["mask_path"] for row in rows):
            spool.flush()
            os.fsync(spool.fileno())
    return ExaminedPiece(rows=rows, table=piece.table, ends_chunk=piece.ends_chunk)


def examine(sample: RawSample, *, rules: Rules, filters: Filters, spool: BinaryIO, shown: set[str]) -> dict[str, Any]:
    """One input → its row of `row_chunks.CHUNK_SCHEMA`. An image whose bytes cannot be kept is written to the spool file.

    `shown`: reasons for which a rejected image already has a thumbnail; a new reason is added.
    """
    found = prepare_captions(sample.captions, extra=sample.extra, config=rules.captions)
    captions, was_cut = found.texts, found.was_cut
    if found.language:
        sample = replace(sample, extra={**sample.extra, LANGUAGE: found.language})
    row = _blank_row(sample)
    row.update(caption=captions[0] if captions else "", captions=captions)
    _measure_texts(row)
    if sample.reason:
        return row
    try:
        data = _read(sample)
    except OSError as error:
        return {**row, "reason": "missing", "detail": f"cannot be read: {error.strerror}"}
    except Rejection as rejection:
        return {**row, "reason": rejection.reason, "detail": rejection.detail}
    row.update(sha256=hashlib.sha256(data).hexdigest(), input_bytes=len(data))
    try:
        image = read_image(data, max_decode_pixels=rules.images.max_decode_pixels, background=rules.images.background_levels)
    except Rejection as rejection:
        if _lacked_memory(rejection):
            raise MemoryError from rejection  # of this process: the pool decides about the input
        return {**row, "reason": rejection.reason, "detail": rejection.detail}

    height, width = image.pixels.shape[:2]
    stored_height, stored_width = rules.images.stored_size(height, width)
    is_scaled = (stored_height, stored_width) != (height, width)
    original_height, original_width = sample.original_size or (image.original_height, image.original_width)
    row.update(
        width=width,
        height=height,
        original_width=original_width,
        original_height=original_height,
        detail=", ".join([*image.changes, *([SCALED_DOWN] if is_scaled else []), *(["caption-cut"] if was_cut else [])]),
    )
    subject = Subject(pixels=image.pixels, bytes=len(data), caption=row["caption"], extra={**sample.filter_only, **sample.extra})
    rejection = found.rejection or _rejection(subject, sample=sample, rules=rules, filters=filters)
    if subject.measured:
        row["extra"] = json.dumps({**sample.extra, **subject.measured}, sort_keys=True)
        _measure_texts(row)
    if rejection:
        row.update(reason=rejection[0], detail=rejection[1])
        if row["reason"] not in shown:
            shown.add(row["reason"])
            row["thumbnail"] = thumbnail(image.pixels)
        return row
    if rules.hashes:
        value = perceptual_hash(image.pixels)
        row["phash"] = "" if value is None else f"{value:016x}"
    if sample.mask is not None:
        stored = stored_height, stored_width
        row |= examine_mask(sample.mask, image=image, stored=stored, max_decode_pixels=rules.images.max_decode_pixels, spool=spool)
        if row["reason"]:
            return row
    if is_scaled:
        image = _scaled(image, size=(stored_height, stored_width))
        row.update(width=stored_width, height=stored_height)
    return {**row, **_stored(sample, data=data, image=image, rules=rules, spool=spool)}


def _fetch(samples: Mapping[int, RawSample]) -> dict[int, bytes | OSError]:
    """Fetch all images at URLs in parallel: index → the bytes, or the error."""
    remote = {index: sample for index, sample in samples.items() if is_remote(sample.file) and sample.data is None and not sample.reason}
    ends = [None if sample.length is None else sample.offset + sample.length for sample in remote.values()]
    ranges = [(sample.file, sample.offset, end) for sample, end in zip(remote.values(), ends, strict=True)]
    return dict(zip(remote, read_ranges(ranges), strict=True))


def _rejection(subject: Subject, *, sample: RawSample, rules: Rules, filters: Filters) -> tuple[str, str] | None:
    limit = _MAX_STORED_SIDE[rules.images.format]
    height, width = rules.images.stored_size(subject.height, subject.width)
    if max(height, width) > limit:
        return "too-large", f"{width}x{height}, a .{rules.images.format} file holds at most {limit} px a side"
    if rules.captions.required and not subject.caption and sample.label is None:
        return "no-caption", sample.detail or "no caption and no class"
    return filters.rejection(subject)


def _scaled(image: DecodedImage, *, size: tuple[int, int]) -> DecodedImage:
    """A smaller copy, by the antialiased Lanczos filter. `size`: (height, width)."""
    pixels = np.asarray(Image.fromarray(image.pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    return replace(image, pixels=pixels, clean=False)


def _measure_texts(row: dict[str, Any]) -> None:
    row["text_bytes"] = len(
        json.dumps([row["caption"], row["captions"], row["caption"], row["path"], row["path"], row["source"], row["extra"]])
    )


def _stored(sample: RawSample, *, data: bytes, image: DecodedImage, rules: Rules, spool: BinaryIO) -> dict[str, Any]:
    """Location of the bytes to store: in the source, or re-encoded in the spool file."""
    can_be_kept = image.clean and rules.images.format == "jpg"
    if can_be_kept and sample.data is None:
        return {"is_spooled": False, "file": os.fsencode(sample.file), "offset": sample.offset, "length": len(data)}
    stored = data if can_be_kept else encode_image(image.pixels, format=rules.images.format)
    offset = spool.tell()
    spool.write(stored)
    return {"is_spooled": True, "file": os.fsencode(Path(spool.name).name), "offset": offset, "length": len(stored)}


def _blank_row(sample: RawSample) -> dict[str, Any]:
    return {
        "source": _utf8(sample.source),
        "path": _utf8(sample.path),
        "reason": sample.reason,
        "detail": _utf8(sample.detail),
        "caption": "",
        "captions": [],
        "label": sample.label,
        "sha256": sample.sha256,
        "phash": "",
        "thumbnail": None,
        "extra": json.dumps(dict(sample.extra), sort_keys=True),
        "text_bytes": 0,
        "input_bytes": 0,
        "is_spooled": False,
        "file": b"",
        "mask_path": "",
    }


def _read(sample: RawSample) -> bytes:
    """The bytes of the image. Raises OSError if they cannot be read, Rejection if there are too many."""
    if sample.data is not None and len(sample.data) <= MAX_IMAGE_BYTES:
        return sample.data
    if sample.data is not None:
        raise Rejection("too-large", detail=f"a file of {len(sample.data)} bytes")
    status = os.stat(sample.file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a file")  # opening a pipe may block forever
    with open(sample.file, "rb") as stream:
        length = status.st_size if sample.length is None else sample.length
        if length > MAX_IMAGE_BYTES:
            raise Rejection("too-large", detail=f"a file of {length} bytes")
        stream.seek(sample.offset)
        return stream.read(length)


def _lacked_memory(rejection: Rejection) -> bool:
    """Whether a decoder ran out of memory; some report it in the message only."""
    return isinstance(rejection.__cause__, MemoryError) or any(sign in rejection.detail.lower() for sign in _LACK_OF_MEMORY)


def _utf8(text: str) -> str:
    """File names and messages may hold bytes that are not UTF-8; tables and JSON must not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
