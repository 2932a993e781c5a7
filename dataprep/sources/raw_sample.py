"""One input as described by its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.corpus.record_fields import Value


@dataclass(frozen=True, slots=True)
class RawMask:
    """The loss mask of an input, `name` in its source: `data`, or `length` bytes at `offset` of `file`, or all of it, as in `RawSample`."""

    name: str
    file: str = ""
    offset: int = 0
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RawSample:
    """One input before its image is examined.

    The image's bytes are `data`, or else `length` bytes at `offset` of `file`, a path or a URL, or the whole file if `length` is None.
    `path`: the input's name in its source. A sample that the source could not read has the `reason` and `detail` of its rejection.
    `sha256`: digest of an image that was taken down, to find other copies. `filter_only`: values for `filters.where` that are not stored.
    `original_size`: (height, width) of the image before an earlier preparation, if any. `detail` without a `reason`: why there is no
    caption.
    """

    source: str
    path: str
    file: str = ""
    offset: int = 0
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)
    captions: tuple[str, ...] = ()
    label: int | None = None
    extra: Mapping[str, Value] = field(default_factory=dict)
    filter_only: Mapping[str, Value] = field(default_factory=dict)
    original_size: tuple[int, int] | None = None
    reason: str = ""
    detail: str = ""
    sha256: str = ""
    mask: RawMask | None = None
