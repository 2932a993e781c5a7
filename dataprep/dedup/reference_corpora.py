"""Corpora that are there already (`--against`): what is in them is not taken in again."""

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
    """The images of some corpora, one after the other; their names, where each begins, and their keys."""

    fingerprints: Fingerprints
    names: tuple[str, ...]
    starts: tuple[int, ...]
    keys: tuple[pa.ChunkedArray, ...]

    def __len__(self) -> int:
        return len(self.fingerprints)

    def id(self, position: int) -> str:
        """CORPUS/KEY of an image, or its KEY in the corpus without a name: the one that is to grow."""
        corpus = int(np.searchsorted(self.starts, position, side="right")) - 1
        key = self.keys[corpus][position - self.starts[corpus]].as_py()
        return f"{self.names[corpus]}/{key}" if self.names[corpus] else key

    @classmethod
    def join(cls, parts: Sequence[ReferenceImages]) -> ReferenceImages:
        """The images of all of them."""
        keys = [own for part in parts for own in part.keys]
        return cls(
            fingerprints=Fingerprints.join([part.fingerprints for part in parts]),
            names=tuple(name for part in parts for name in part.names),
            starts=tuple(np.cumsum([0, *map(len, keys)])[:-1].tolist()),
            keys=tuple(keys),
        )


NO_REFERENCES = ReferenceImages.join([])


def open_references(paths: Sequence[str | Path]) -> list[Corpus]:
    """The corpora, folders or URLs. Raises ValueError if one is none, or does not say what its images look like."""
    corpora = [Corpus.open(path, check_shards=False) for path in paths]
    for corpus in corpora:
        missing = [name for name in _COLUMNS if name not in corpus.schema.names]
        if missing:
            raise ValueError(
                f"against {corpus.folder}: its tables have no column {missing[0]}; only what `tim prepare` made can be compared"
            )
    return corpora


def read_references(corpora: Sequence[Corpus]) -> ReferenceImages:
    """Read the tables of corpora, one shard at a time: about 50 bytes an image stay in memory."""
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
