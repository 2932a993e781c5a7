"""Encode one shard of a corpus into one shard of features: a tar, its table, and the stats file that commits both."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataprep.features.encoders import EncodeConfig, Encoders, View
from dataprep.features.live_view import fit_live_view
from dataprep.shards.writer import shard_name
from dataprep.workers.decode_pool import DecodeRequest, Decoders
from dataprep.workers.prefetch import prefetched
from pipeline.corpus.corpus import Corpus
from pipeline.digests import file_digest
from pipeline.features.manifest import FORMAT
from pipeline.features.tensors import text_name
from pipeline.features.writer import FeatureWriter
from pipeline.images import Pixels
from pipeline.size_rule import Crop, target_sizes
from pipeline.storage.atomic import publish, publish_text
from pipeline.storage.shard_reader import ByteRange, ShardReader
from pipeline.streams.corpus_view import integers

PIECE_PIXELS, PIECE_SAMPLES = 32 * 1024 * 1024, 256  # decoded and encoded together; the bytes of the result depend on them
_COLUMNS = ("key", "width", "height", "captions", "image_offset", "image_length")


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the corpus with the sizes at which to encode it."""

    key: str
    captions: list[str]
    crops: list[Crop]
    image: tuple[int, int]  # offset, length


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """A finished shard: its manifest entry (`of`: digest of the corpus's table) and the counts in its stats file."""

    name: str
    bytes: int
    sha256: str
    table: str
    table_sha256: str
    of: str
    samples: int
    captions: int
    rejected: dict[str, int]
    cut: int = 0  # captions that are longer than the text encoder reads


def finished_shard(out: Path, *, number: int, of: str) -> EncodedShard | None:
    """The shard if it is complete and of this table of the corpus: stats file written, table present, tar of full length."""
    stem = shard_name(number)
    try:
        stats = json.loads((out / f"{stem}_stats.json").read_text("utf-8"))
        shard = EncodedShard(**stats["shard"])
        is_complete = (out / shard.name).stat().st_size == shard.bytes and (out / shard.table).is_file()
        return shard if stats["format"] == FORMAT and shard.of == of and is_complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode_shard(
    corpus: Corpus, number: int, *, out: Path, config: EncodeConfig, encoders: Encoders, decoders: Decoders, report: Callable[[int], None]
) -> EncodedShard:
    """Write tar, table and stats of one shard, in this order. `report` is called with the number of samples just finished.

    Samples are stored in order of size, so that images encoded together have similar sizes. Raises OSError if the shard of the corpus
    cannot be read; an image that cannot be decoded is left out and counted.
    """
    samples = read_samples(corpus, number, config=config)
    stem = shard_name(number)
    rejected: Counter[str] = Counter()
    cut = 0
    live_view: dict[str, Any] | None = None
    in_pieces = _decoded(corpus.shards[number].path, pieces(samples, flip=config.flip), decoders=decoders, flip=config.flip)
    with publish(out / f"{stem}.tar") as stream, closing(in_pieces):
        writer = FeatureWriter(stream, zstd=config.zstd)
        for piece, decoded in in_pieces:
            views = [view for found in decoded if not isinstance(found, str) for view in found]
            encoded = encoders.images(views)
            if number == 0 and live_view is None:
                live_view = fit_live_view(views, encoded, encoders=encoders)
            image_features = iter(encoded)
            texts = [text for sample in piece for text in sample.captions]
            caption_features = iter(encoders.captions(texts) if encoders.text else ())
            cut += encoders.count_cut(texts)
            for sample, found in zip(piece, decoded, strict=True):
                count = len(sample.captions) if encoders.text else 0
                text_tensors = {text_name(i): next(caption_features) for i in range(count)}
                if isinstance(found, str):
                    rejected[found] += 1
                    writer.leave_out(sample.key, reason=found, crops=sample.crops, captions=count)
                    continue
                tensors = {name: tensor for _ in found for name, tensor in next(image_features).items()}
                writer.add(sample.key, {**tensors, **text_tensors}, crops=sample.crops, captions=count)
            report(len(piece))
        table = writer.finish(sorted(sample.key for sample in samples))
    with publish(out / f"{stem}.parquet") as stream:
        stream.write(table)
    shard = EncodedShard(
        name=f"{stem}.tar",
        bytes=(out / f"{stem}.tar").stat().st_size,
        sha256=file_digest(out / f"{stem}.tar"),
        table=f"{stem}.parquet",
        table_sha256=hashlib.sha256(table).hexdigest(),
        of=corpus.shards[number].digest,
        samples=len(samples),
        captions=sum(len(sample.captions) for sample in samples) if encoders.text else 0,
        rejected=dict(sorted(rejected.items())),
        cut=cut,
    )
    stats = {"format": FORMAT, "shard": asdict(shard), **({"live_view": live_view} if number == 0 else {})}
    publish_text(out / f"{stem}_stats.json", json.dumps(stats, indent=1) + "\n")
    return shard


def fitted_live_view(out: Path) -> dict[str, Any] | None:
    """The live view that was fitted to images of the first shard, which is finished; None if there is none."""
    found = json.loads((out / f"{shard_name(0)}_stats.json").read_text("utf-8"))
    return found.get("live_view")


def read_samples(corpus: Corpus, number: int, *, config: EncodeConfig) -> list[Sample]:
    """All samples of a shard in order of size. A sample that no size rule keeps has no crops."""
    table = corpus.read(number, columns=_COLUMNS)
    heights, widths = integers(table, "height"), integers(table, "width")
    keys = corpus.bare_keys(number, table.column("key").to_pylist())
    crops: list[dict[Crop, None]] = [{} for _ in keys]
    for rule in config.rules:
        targets = target_sizes(heights, widths=widths, rule=rule)
        for row in np.flatnonzero(targets.left_out == 0).tolist():
            crops[row][tuple(targets.crops[row].tolist())] = None
    offsets, lengths = integers(table, "image_offset").tolist(), integers(table, "image_length").tolist()
    captions = [each or [""] for each in table.column("captions").to_pylist()]
    in_order = np.lexsort((np.arange(len(keys)), widths, heights)).tolist()
    return [Sample(keys[i], captions[i], [*crops[i]], (offsets[i], lengths[i])) for i in in_order]


def pieces(samples: Sequence[Sample], *, flip: bool) -> Iterator[list[Sample]]:
    """Groups of samples that are encoded together. They do not depend on the process."""
    piece: list[Sample] = []
    filled = 0
    for sample in samples:
        pixels = sum(height * width for _, _, height, width in sample.crops) * (1 + flip)
        if piece and (len(piece) == PIECE_SAMPLES or filled + pixels > PIECE_PIXELS):
            yield piece
            piece, filled = [], 0
        piece.append(sample)
        filled += pixels
    if piece:
        yield piece


def _decoded(
    tar: str, pieces: Iterator[list[Sample]], *, decoders: Decoders, flip: bool
) -> Generator[tuple[list[Sample], list[list[View] | str]], None, None]:
    """Each piece with the views of its samples, or the reason why one has none. The next piece is decoded in the background."""
    shards = ShardReader()

    def read(piece: list[Sample]) -> tuple[list[Sample], list[list[View] | str]]:
        wanted = [sample for sample in piece if sample.crops]
        requests: list[DecodeRequest] = []
        for sample, data in zip(wanted, shards.read_parts([ByteRange(tar, *sample.image) for sample in wanted]), strict=True):
            if isinstance(data, OSError):
                raise data
            requests.append(DecodeRequest(bytes(data), sample.crops))
        views: dict[str, list[View] | str] = {}
        for sample, found in zip(wanted, decoders.decode(requests), strict=True):
            views[sample.key] = found if isinstance(found, str) else _views(sample, found, flip=flip)
        return piece, [views.get(sample.key, []) for sample in piece]

    try:
        yield from prefetched(read, pieces)
    finally:
        shards.close()


def _views(sample: Sample, images: Sequence[Pixels], *, flip: bool) -> list[View]:
    import torch

    views: list[View] = []
    for crop, pixels in zip(sample.crops, images, strict=True):
        image = torch.from_numpy(pixels)
        views.append(View(crop, False, image))
        if flip:
            views.append(View(crop, True, image.flip(-1)))
    return views
