"""Append to a finished corpus: read what it holds, and select the inputs that are new or worth a retry.

An input is identified by its source's name and its path. Existing shards stay unchanged, including rejected rows. If a rejected input is
retried, its new row replaces the old one in the input counts; the manifest records the number of replaced rows (`growth`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.dedup.perceptual import Fingerprints
from dataprep.dedup.reference_corpora import ReferenceImages
from dataprep.row_schema import TAKEN_DOWN
from dataprep.shards.layout import ExtraColumns
from dataprep.shards.manifest import InputCounts, kept_rows, read_columns, read_input_counts, read_tables
from dataprep.shards.store import Store
from dataprep.shards.writer import ShardEntry
from dataprep.sources.raw_sample import RawSample

RETRIED = ("missing", "empty", "not-an-image", "damaged", "truncated", "unsupported", "no-caption", "bad-record", "crashed")
"""Reasons that may no longer hold: the file may be restored, repaired or captioned, or its decoder installed. Inputs that a rule rejected
are not retried. Tables of earlier versions have `truncated` for `damaged`."""


_COLUMNS = ("key", "source", "path", "reason", "sha256", "phash", "width", "height", "image_length")


@dataclass(frozen=True, slots=True)
class AppendMode:
    """What to add to a corpus: new inputs (`append`), rejected inputs that can be read now (`retry`), or both."""

    append: bool
    retry: bool


@dataclass(frozen=True, slots=True)
class Base:
    """The corpus to append to."""

    manifest: Mapping[str, Any]
    shards: Sequence[ShardEntry]
    counts: InputCounts
    columns: ExtraColumns
    images: ReferenceImages
    taken_down: np.ndarray  # (m, 2) uint64, digests as in `Fingerprints`


class Selection:
    """Selects inputs to add. `ids`: sorted ids of the corpus's inputs, (n,) of 16 bytes. `failed`: id → reasons of rows to retry."""

    def __init__(self, append_mode: AppendMode, *, ids: np.ndarray, failed: dict[bytes, list[str]]) -> None:
        self._mode = append_mode
        self._ids = ids
        self._failed = failed if append_mode.retry else {}
        self.replaced: Counter[str] = Counter()
        self._skipped: Counter[tuple[str, str]] = Counter()

    def of(self, samples: Iterable[RawSample]) -> Iterator[RawSample]:
        """Yield the samples to add. `replaced` counts, by reason, the rows that they replace."""
        for sample in samples:
            name = input_id(sample.source, sample.path)
            reasons = self._failed.get(name)
            if reasons:
                self.replaced[reasons.pop()] += 1
                yield sample
            elif self._is_known(name):
                self._skipped[sample.source, "input(s) are in the corpus already"] += 1
            elif self._mode.append:
                yield sample
            else:
                self._skipped[sample.source, "input(s) are new: append mode takes them"] += 1

    def notes(self) -> list[str]:
        """One sentence for each group of skipped inputs."""
        return [f"{source}: {count} {what}" for (source, what), count in sorted(self._skipped.items())]

    def _is_known(self, name: bytes) -> bool:
        index = int(np.searchsorted(self._ids, np.array(name, dtype="S16")))
        return index < len(self._ids) and self._ids[index] == np.array(name, dtype="S16")


def read_base(store: Store, *, manifest: Mapping[str, Any], append_mode: AppendMode) -> tuple[Base, Selection]:
    """Read the corpus to append to, in one pass over its tables."""
    shards = [ShardEntry(**shard) for shard in manifest["shards"]]
    first_added = {step["first_shard"] for step in manifest.get("growth", ())}
    ids: list[np.ndarray] = [np.zeros(0, dtype="S16")]
    keys: list[pa.Array] = []
    prints: list[Fingerprints] = []
    taken_down: list[np.ndarray] = [np.zeros((0, 2), dtype=np.uint64)]
    failed: dict[bytes, list[str]] = {}
    fresh: list[tuple[bytes, str]] = []  # failed inputs of the current append
    for number, table in enumerate(read_tables(store, shards=shards, columns=_COLUMNS)):
        if number in first_added:
            _add_failed(failed, fresh)
            fresh = []
        sources, paths = (table.column(name).to_pylist() for name in ("source", "path"))
        names = [input_id(source, path) for source, path in zip(sources, paths, strict=True)]
        ids.append(np.array(names, dtype="S16"))
        for name, reason in zip(names, table.column("reason").to_pylist(), strict=True):
            if failed.get(name):
                failed[name].pop()  # it was retried
            if reason in RETRIED:
                fresh.append((name, reason))
        taken_down.append(Fingerprints.read(table.filter(pc.field("reason") == TAKEN_DOWN), size="image_length").digest)
        kept = kept_rows(table)
        keys.extend(kept.column("key").chunks)
        prints.append(Fingerprints.read(kept, size="image_length"))
    _add_failed(failed, fresh)
    base = Base(
        manifest=manifest,
        shards=shards,
        counts=read_input_counts(manifest),
        columns=read_columns(manifest),
        taken_down=np.concatenate(taken_down),
        images=ReferenceImages(
            fingerprints=Fingerprints.join(prints), names=("",), starts=(0,), keys=(pa.chunked_array(keys, pa.string()),)
        ),
    )
    return base, Selection(append_mode, ids=np.unique(np.concatenate(ids)), failed=failed)


def _add_failed(failed: dict[bytes, list[str]], fresh: Iterable[tuple[bytes, str]]) -> None:
    for name, reason in fresh:
        failed.setdefault(name, []).append(reason)


def input_id(source: str, path: str) -> bytes:
    """Identifier of an input, 16 bytes."""
    return hashlib.blake2b(f"{source}\0{path}".encode("utf-8", "backslashreplace"), digest_size=16).digest()
