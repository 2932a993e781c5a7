"""The row tables of a corpus: their columns, and the closed vocabulary of rejection reasons."""

from __future__ import annotations

import pyarrow as pa

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
TAKEN_DOWN = "takedown"
FILTER_PREFIX = "filter:"
SCALED_DOWN = "scaled-down"
"""In `detail` of a kept image that was scaled down."""

MEMBERS = ("image", "text", "cls", "json", "mask")
"""Members of one sample in a shard; each has the columns MEMBER_offset and MEMBER_length. Only corpora with loss masks have the last."""

TABLE_FIELDS = [
    *((name, pa.string()) for name in ("key", "source", "path", "status", "reason", "detail")),
    *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
    ("caption", pa.string()),
    ("captions", pa.list_(pa.string())),
    ("label", pa.int32()),
    *((name, pa.string()) for name in ("sha256", "duplicate_of", "near_duplicate_of", "phash")),
    *((f"{member}_{what}", pa.int64()) for member in MEMBERS[:-1] for what in ("offset", "length")),
    ("thumbnail", pa.binary()),  # of some rejected images, for the report
]
"""Columns of every row table; the extra columns of the sources follow."""
MASK_FIELDS = [("mask_path", pa.string()), ("mask_offset", pa.int64()), ("mask_length", pa.int64())]
"""Further columns in corpora with loss masks. `mask_path`: the mask as the source names it, "" for a sample without one (its mask is
white)."""
TABLE_COLUMNS = frozenset(name for name, _ in (*TABLE_FIELDS, *MASK_FIELDS))

SEMANTIC_DUPLICATE = "semantic_duplicate_of"
"""Column of the sidecar written by `tim score`: the key of the image to keep instead, or ""."""
