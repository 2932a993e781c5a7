"""One input as its source describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.corpus.record_fields import Value


@dataclass(frozen=True, slots=True)
class RawSample:
    """One input before its image is examined.

    The image's bytes are `data`, or else `length` bytes at `offset` of `file`, a path or a URL, or the whole file if `length` is None.
    `path` is what the source calls it. A sample that its source could not read already carries the `reason` and `detail` of its rejection.
    Of one that is taken down, `sha256` is the image's digest, by which other copies are found.
    `filter_only`: further values that `filters.where` may ask for, and that are not stored. `original_size`: (height, width) of the image
    before an earlier preparation, if there was one. `detail` without a `reason` says why there is no caption.
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
