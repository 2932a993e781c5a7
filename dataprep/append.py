"""A finished corpus that is to grow: what is in it, which inputs are new to it, and which rejected ones are worth another look.

An input is known by its source's name and its own path. The old shards stay as they are, rejected rows included; where a rejected input
gets another chance, its new row replaces the old one in the account, and the manifest says how many rows are replaced (`growth`).
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
"""Reasons that a file that came back, was repaired or got its caption, or a decoder that was installed takes away; what was decided by a
rule stays decided. `truncated` is what tables of earlier versions say for `damaged`."""


_COLUMNS = ("key", "source", "path", "reason", "sha256", "phash", "width", "height", "image_length")


@dataclass(frozen=True, slots=True)
class AppendMode:
    """How a corpus is to grow: by inputs that are new to it (`append`), by rejected ones that can be read now (`retry`), or by both."""

    append: bool
    retry: bool


@dataclass(frozen=True, slots=True)
class Base:
    """The corpus as it is."""

    manifest: Mapping[str, Any]
    shards: Sequence[ShardEntry]
    counts: InputCounts
    columns: ExtraColumns
    images: ReferenceImages
    taken_down: np.ndarray  # (m, 2) uint64, digests as in `Fingerprints`


class Selection:
    """Which of the sources' inputs are taken. `ids`: the inputs of the corpus, (n,) of 16 bytes, sorted; `failed`: of those that may be
    read again, the reasons of their rows."""

    def __init__(self, append_mode: AppendMode, *, ids: np.ndarray, failed: dict[bytes, list[str]]) -> None:
        self._growth = append_mode
        self._ids = ids
        self._failed = failed if append_mode.retry else {}
        self.replaced: Counter[str] = Counter()
        self._passed: Counter[tuple[str, str]] = Counter()

    def of(self, samples: Iterable[RawSample]) -> Iterator[RawSample]:
        """The samples that are taken. The rows that they replace are counted in `replaced`, by reason."""
        for sample in samples:
            name = input_id(sample.source, sample.path)
            reasons = self._failed.get(name)
            if reasons:
                self.replaced[reasons.pop()] += 1
                yield sample
            elif self._is_known(name):
                self._passed[sample.source, "input(s) are in the corpus already"] += 1
            elif self._growth.append:
                yield sample
            else:
                self._passed[sample.source, "input(s) are new: --append takes them"] += 1

    def notes(self) -> list[str]:
        """What was not taken, in sentences."""
        return [f"{source}: {count} {what}" for (source, what), count in sorted(self._passed.items())]

    def _is_known(self, name: bytes) -> bool:
        place = int(np.searchsorted(self._ids, np.array(name, dtype="S16")))
        return place < len(self._ids) and self._ids[place] == np.array(name, dtype="S16")


def read_base(store: Store, *, manifest: Mapping[str, Any], append_mode: AppendMode) -> tuple[Base, Selection]:
    """What has to be known of a corpus: one pass over its tables."""
    shards = [ShardEntry(**shard) for shard in manifest["shards"]]
    first_added = {step["first_shard"] for step in manifest.get("growth", ())}
    ids: list[np.ndarray] = [np.zeros(0, dtype="S16")]
    keys: list[pa.Array] = []
    prints: list[Fingerprints] = []
    taken_down: list[np.ndarray] = [np.zeros((0, 2), dtype=np.uint64)]
    failed: dict[bytes, list[str]] = {}
    fresh: list[tuple[bytes, str]] = []  # what failed among the inputs that came in together with those at hand
    for number, table in enumerate(read_tables(store, shards=shards, columns=_COLUMNS)):
        if number in first_added:
            _join(failed, fresh)
            fresh = []
        sources, paths = (table.column(name).to_pylist() for name in ("source", "path"))
        names = [input_id(source, path) for source, path in zip(sources, paths, strict=True)]
        ids.append(np.array(names, dtype="S16"))
        for name, reason in zip(names, table.column("reason").to_pylist(), strict=True):
            if failed.get(name):
                failed[name].pop()  # it had another chance
            if reason in RETRIED:
                fresh.append((name, reason))
        taken_down.append(Fingerprints.read(table.filter(pc.field("reason") == TAKEN_DOWN), size="image_length").digest)
        kept = kept_rows(table)
        keys.extend(kept.column("key").chunks)
        prints.append(Fingerprints.read(kept, size="image_length"))
    _join(failed, fresh)
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


def _join(failed: dict[bytes, list[str]], fresh: Iterable[tuple[bytes, str]]) -> None:
    for name, reason in fresh:
        failed.setdefault(name, []).append(reason)


def input_id(source: str, path: str) -> bytes:
    """What an input is known by, 16 bytes."""
    return hashlib.blake2b(f"{source}\0{path}".encode("utf-8", "backslashreplace"), digest_size=16).digest()
