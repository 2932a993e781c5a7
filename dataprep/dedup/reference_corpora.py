"""Finished corpora (`against`) whose images count as duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataprep.dedup.perceptual import Fingerprints
from pipeline.corpus.corpus import Corpus

_COLUMNS = ("sha256", "phash", "width", "height", "image_length")


@dataclass(frozen=True, slots=True)
class ReferenceImages:
    """The concatenated images of several corpora. `starts`: the position of the first image of each corpus."""

    fingerprints: Fingerprints
    names: tuple[str, ...]
    starts: tuple[int, ...]
    keys: tuple[pa.ChunkedArray, ...]

    def __len__(self) -> int:
        return len(self.fingerprints)

    def id(self, position: int) -> str:
        """CORPUS/KEY of an image, or KEY in the corpus without a name, which is the one to append to."""
        corpus = int(np.searchsorted(self.starts, position, side="right")) - 1
        key = self.keys[corpus][position - self.starts[corpus]].as_py()
        return f"{self.names[corpus]}/{key}" if self.names[corpus] else key

    @classmethod
    def join(cls, parts: Sequence[ReferenceImages]) -> ReferenceImages:
        """Concatenate."""
        keys = [own for part in parts for own in part.keys]
        return cls(
            fingerprints=Fingerprints.join([part.fingerprints for part in parts]),
            names=tuple(name for part in parts for name in part.names),
            starts=tuple(np.cumsum([0, *map(len, keys)])[:-1].tolist()),
            keys=tuple(keys),
        )


NO_REFERENCES = ReferenceImages.join([])


def open_references(paths: Sequence[str | Path]) -> list[Corpus]:
    """Open corpora in folders or at URLs. Raises ValueError if one is not a corpus or has no perceptual hashes."""
    corpora = [Corpus.open(path, check_shards=False) for path in paths]
    for corpus in corpora:
        missing = [name for name in _COLUMNS if name not in corpus.schema.names]
        if missing:
            raise ValueError(
                f"against {corpus.folder}: its tables have no column {missing[0]}; only corpora of `tim prepare` can be compared"
            )
    return corpora


def read_references(corpora: Sequence[Corpus]) -> ReferenceImages:
    """Read the tables of corpora, one shard at a time. Uses about 50 bytes per image."""
    parts: list[ReferenceImages] = []
    for corpus in corpora:
        keys: list[pa.Array] = []
        prints: list[Fingerprints] = []
        for shard in range(len(corpus.shards)):
            table = corpus.read(shard, columns=("key", *_COLUMNS))
            keys += table.column("key").cast(pa.string()).chunks
            prints.append(Fingerprints.read(table, size="image_length"))
        own = Fingerprints.join(prints)
        parts.append(ReferenceImages(fingerprints=own, names=(corpus.name,), starts=(0,), keys=(pa.chunked_array(keys, pa.string()),)))
    return ReferenceImages.join(parts)
