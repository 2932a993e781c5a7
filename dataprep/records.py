"""The records of preparation: an input as a source names it, and the vocabulary of what may become of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.fields import Value

REASONS: tuple[str, ...] = (
    "missing",
    "empty",
    "not-an-image",
    "damaged",
    "unsupported",
    "too-large",
    "too-small",
    "aspect",
    "no-caption",
    "duplicate",
    "near-duplicate",
    "takedown",
    "bad-record",
    "crashed",
)
FILTER_PREFIX = "filter:"


@dataclass(frozen=True, slots=True)
class RawSample:
    """One input before anybody looked at its picture.

    The picture's bytes are `data`, or else `length` bytes at `offset` of `file`, a path or a URL, or the whole file if `length` is None.
    `path` is what the source calls it. A sample that its source could not read already carries the `reason` and `detail` of its rejection.
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
    reason: str = ""
    detail: str = ""
