"""Semantic duplicates: images whose embeddings (`tim score`) are nearly parallel, in one corpus and against others.

Embeddings are stored in a file on disk, in order of preference, and compared block by block on the device. Memory: about 50 bytes per
image. Time grows with the square of the number of images (10⁶ images of 512 numbers: 3·10¹⁴ multiplications, minutes on a GPU).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataprep.dedup.perceptual import Ints, keep_first
from dataprep.row_schema import SEMANTIC_DUPLICATE
from dataprep.sidecars.writer import opened_for_sidecars, write_sidecar
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.sidecars import Sidecar, provider
from pipeline.progress import Progress
from pipeline.streams.corpus_view import integers

if TYPE_CHECKING:
    import torch

EMBEDDING = "embedding"
_BLOCK = 2048  # all pairs of a block may be similar, at about 60 bytes per pair


def mark_duplicates(
    path: str | Path,
    *,
    name: str,
    threshold: float,
    against: Sequence[str | Path],
    embeddings: Sidecar,
    device: torch.device,
    progress: Progress,
) -> int:
    """Write the sidecar `name` with the column `semantic_duplicate_of`: the key of the kept image, CORPUS/KEY if another corpus has it, or
    "" for images that are not duplicates. Returns the number of duplicates.

    Images are visited by most pixels, most bytes, first position. An image is a duplicate of the nearest image *kept* before it whose
    embedding has a cosine of at least `threshold`. Images of the corpora `against` are visited first and always kept.

    Raises ValueError if a corpus has no embeddings, or those of another model.
    """
    with opened_for_sidecars(path, name=name) as (corpus, store):
        others = [Corpus.open(other, check_shards=False) for other in against]
        width = _check_embeddings(corpus, others=others)
        corpora = [*others, corpus]
        count = sum(each.count for each in corpora)
        fixed = count - corpus.count
        position = _order(corpora, fixed=fixed)
        rank = np.argsort(position)
        file = store.scratch / f"{name}.f16"
        try:
            stored = np.memmap(file, dtype=np.float16, mode="w+", shape=(max(count, 1), width))
            for start, found in _embeddings(corpora):
                stored[rank[start : start + len(found)]] = found
            best = _compare(stored[:count], fixed=fixed, threshold=threshold, device=device, progress=progress)
            del stored
        finally:
            file.unlink(missing_ok=True)
        original = np.full(count, -1, dtype=np.int64)
        original[position] = np.where(best >= 0, position[best], -1)
        ids = _ids(corpora, wanted=set(original[original >= 0].tolist()))
        texts = ["" if of < 0 else ids[of] for of in original[fixed:].tolist()]
        starts = np.cumsum([0, *[shard.count for shard in corpus.shards]]).tolist()
        schema = pa.schema([(SEMANTIC_DUPLICATE, pa.string())])
        write_sidecar(
            corpus,
            store=store,
            name=name,
            schema=schema,
            identity={"threshold": threshold, "embeddings": embeddings.digest, "against": [_digest(other) for other in others]},
            make=lambda shard: pa.Table.from_pydict({SEMANTIC_DUPLICATE: texts[starts[shard] : starts[shard + 1]]}, schema=schema),
        )
    return int((original[fixed:] >= 0).sum())


def _check_embeddings(corpus: Corpus, *, others: Sequence[Corpus]) -> int:
    """Width of the embeddings. Raises ValueError if they are missing or of another model."""
    fields = []
    for each in (corpus, *others):
        if EMBEDDING not in each.schema.names:
            raise ValueError(f"against {each.folder}: has no embeddings: run `tim score` on it with embeddings=true and the same model")
        fields.append(each.schema.field(EMBEDDING))
    for each, found in zip(others, fields[1:], strict=True):
        if found.type != fields[0].type or found.metadata != fields[0].metadata:
            raise ValueError(f"against {each.folder}: its embeddings are of another model: run `tim score` on it with this one")
    return fields[0].type.list_size


def _digest(corpus: Corpus) -> str:
    found = provider(corpus.sidecars, EMBEDDING)
    assert found is not None
    return found.digest


def _order(corpora: Sequence[Corpus], *, fixed: int) -> Ints:
    """(n,): positions of the images in order of visit."""
    parts = []
    for corpus in corpora:
        for shard in range(len(corpus.shards)):
            table = corpus.read(shard, columns=("width", "height", "image_length"))
            parts.append(np.stack([-integers(table, "width") * integers(table, "height"), -integers(table, "image_length")]))
    pixels, size = np.concatenate([np.zeros((2, 0), dtype=np.int64), *parts], axis=1)
    return np.lexsort((size, pixels, np.arange(len(size)) >= fixed))


def _embeddings(corpora: Sequence[Corpus]) -> Iterator[tuple[int, NDArray[np.float16]]]:
    """(position of the first image, (n, D)) of each shard, zeros for unreadable images."""
    start = 0
    for corpus in corpora:
        for shard in range(len(corpus.shards)):
            column: Any = corpus.read(shard, columns=(EMBEDDING,)).column(EMBEDDING).combine_chunks()
            found = np.zeros((len(column), column.type.list_size), dtype=np.float16)
            found[column.is_valid().to_numpy(zero_copy_only=False)] = column.flatten().to_numpy().reshape(-1, column.type.list_size)
            yield start, found
            start += len(found)


def _compare(stored: NDArray[np.float16], *, fixed: int, threshold: float, device: torch.device, progress: Progress) -> Ints:
    """(n,): the nearest kept image before each image, −1 if the image is kept. The first `fixed` images are kept."""
    import torch

    count = len(stored)
    best = np.full(count, -1, dtype=np.int64)

    def block(start: int) -> torch.Tensor:
        rounded = torch.from_numpy(np.array(stored[start : start + _BLOCK])).to(device).float()
        return torch.nn.functional.normalize(rounded, dim=-1)

    for start in range(0, count, _BLOCK):
        here = block(start)
        nearest = torch.full((len(here),), -2.0, device=device)
        whose = torch.full((len(here),), -1, device=device, dtype=torch.int64)
        for before in range(0, start, _BLOCK):
            kept = torch.from_numpy(best[before : before + _BLOCK] < 0).to(device)
            cosines, at = torch.where(kept, here @ block(before).T, -2.0).max(dim=1)
            whose = torch.where(cosines > nearest, at + before, whose)
            nearest = torch.maximum(nearest, cosines)
        found = torch.where(nearest >= threshold, whose, -1).cpu().numpy()
        best[start : start + len(here)] = found
        best[: min(fixed, count)] = -1
        left = np.flatnonzero(best[start : start + len(here)] < 0)
        among = here[torch.from_numpy(left).to(device)]
        cosines = (among @ among.T).cpu().numpy()
        later, earlier = np.nonzero(np.tril(cosines >= threshold, -1))
        distance = 1 - cosines[later, earlier]
        own = keep_first(earlier, later, distance, count=len(left), fixed=int((left + start < fixed).sum()))
        best[start + left] = np.where(own >= 0, start + left[own], -1)
        progress("compare", start + len(here), count)
    return best


def _ids(corpora: Sequence[Corpus], *, wanted: set[int]) -> dict[int, str]:
    """Position → key, with the corpus's name in front for all but the last corpus."""
    ids: dict[int, str] = {}
    start = 0
    for corpus in corpora:
        prefix = "" if corpus is corpora[-1] else f"{corpus.name}/"
        for shard in range(len(corpus.shards)):
            keys = corpus.read(shard, columns=("key",)).column("key").to_pylist()
            ids |= {start + row: prefix + key for row, key in enumerate(keys) if start + row in wanted}
            start += len(keys)
    return ids
