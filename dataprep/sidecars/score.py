"""`tim score`: scores of the images of a finished corpus by an open_clip model, as a sidecar table. Read `score` from top to bottom.

One batch of images is in memory while the next one is read and decoded. A killed run resumes with the shards that lack a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dataprep.row_schema import SEMANTIC_DUPLICATE
from dataprep.sidecars.open_clip_model import Clip, Head, model_file, probability
from dataprep.sidecars.semantic_dedup import EMBEDDING, mark_duplicates
from dataprep.sidecars.writer import RESERVED, opened_for_sidecars, write_sidecar
from dataprep.workers.decode_pool import Decoded, DecodeRequest, Decoders
from dataprep.workers.prefetch import prefetched
from pipeline.corpus.corpus import Corpus
from pipeline.digests import file_digest
from pipeline.progress import Progress, no_progress
from pipeline.size_rule import Crop
from pipeline.storage.shard_reader import BadShard, ByteRange, ShardReader
from pipeline.streams.corpus_view import integers
from tim.model_kinds import Dtype

if TYPE_CHECKING:
    from torch import Tensor

SIMILARITY, AESTHETIC = "similarity", "aesthetic"
_DECODED_SIDE = 2.0  # times the model's side; larger images are decoded at reduced size


class LabelConfig(BaseModel):
    """A zero-shot label: the probability that a `positive` text describes the image rather than a `negative` one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positive: tuple[str, ...] = Field(min_length=1)
    negative: tuple[str, ...] = Field(min_length=1)


class ScoreConfig(BaseModel):
    """What to score.

    `model`: a folder with open_clip_config.json and weights, `hf-hub:ORG/NAME`, or an architecture (ViT-L-14) with `weights`, a file or a
    published tag. `similarity`: cosine of image and first caption. `aesthetic`: the weights file of a linear head on the embedding.
    `labels`: one column per label. `embeddings`: store them, in half precision. `duplicates`: images whose embeddings have at least this
    cosine are semantic duplicates; the table names the larger image (computes and stores embeddings).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights: str | None = None
    precision: Dtype = "fp32"
    batch: int = Field(default=64, ge=1)
    device: str | None = None
    similarity: bool = True
    aesthetic: Path | None = None
    labels: dict[str, LabelConfig] = Field(default_factory=dict)
    embeddings: bool = False
    duplicates: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _check_columns(self) -> ScoreConfig:
        taken = {*RESERVED, SIMILARITY, AESTHETIC, EMBEDDING, SEMANTIC_DUPLICATE}
        for name in self.labels:
            if name in taken or not name.isidentifier():
                raise ValueError(f"labels: {name!r} cannot be a column name: use letters, digits and _, and no reserved name")
        if not self.score_columns.names:
            raise ValueError("similarity, aesthetic, labels, embeddings, duplicates: all are off: switch on at least one")
        return self

    @property
    def keeps_embeddings(self) -> bool:
        return self.embeddings or self.duplicates is not None

    @property
    def score_columns(self) -> pa.Schema:
        """The columns; only the model defines the width of the embeddings."""
        names = [*[SIMILARITY] * self.similarity, *[AESTHETIC] * (self.aesthetic is not None), *self.labels]
        return pa.schema([(name, pa.float32()) for name in names] + [(EMBEDDING, pa.list_(pa.float16()))] * self.keeps_embeddings)


@dataclass(slots=True)
class Scored:
    """Result. `unreadable` samples have no scores; `means` are over the scores computed by this run."""

    sidecar: str
    samples: int
    unreadable: int = 0
    computed: int = 0
    means: dict[str, float] = field(default_factory=dict)
    duplicates: int | None = None


def score(
    corpus: str | Path,
    *,
    config: ScoreConfig,
    name: str = "scores",
    against: Sequence[str | Path] = (),
    workers: int = 1,
    progress: Progress = no_progress,
) -> Scored:
    """Score all images of a corpus, in a folder or at a URL, into the sidecar `name`, which is replaced if it exists.

    `against`: corpora scored with the same model; with `duplicates`, images in these count as duplicates, too. `workers`: decoding
    processes. `progress` is called with ("score", samples done, samples).

    Raises ValueError or RuntimeError if the model, the head or the corpus cannot be used.
    """
    if against and config.duplicates is None:
        raise ValueError("against: needs duplicates=COSINE, without which nothing is compared")
    model = Clip(config.model, weights=config.weights, precision=config.precision, device=config.device)
    with opened_for_sidecars(corpus, name=name) as (opened, store), Decoders(workers) as decoders, ThreadPoolExecutor(workers) as threads:
        result = Scored(sidecar=name, samples=opened.count)
        scorer = _Scorer(
            opened,
            model=model,
            config=config,
            decoders=decoders,
            threads=threads,
            result=result,
            progress=lambda n: progress("score", n, opened.count),
        )
        identity = _identity(config)
        scores = write_sidecar(
            opened, store=store, name=name, schema=scorer.schema, identity=identity, make=scorer.shard, progress=scorer.finished
        )
    if config.duplicates is not None:
        result.duplicates = mark_duplicates(
            corpus,
            name=f"{name}-duplicates",
            threshold=config.duplicates,
            against=against,
            embeddings=scores,
            device=model.device,
            progress=progress,
        )
    return result


class _Scorer:
    """Scores shards, one after the other."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        model: Clip,
        config: ScoreConfig,
        decoders: Decoders,
        threads: ThreadPoolExecutor,
        result: Scored,
        progress: Callable[[int], None],
    ) -> None:
        self._corpus = corpus
        self._model = model
        self._config = config
        self._decoders = decoders
        self._threads = threads
        self._result = result
        self._progress = progress
        self._done = 0
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._reader = ShardReader(max_open_files=4)
        self._head = None if config.aesthetic is None else Head(config.aesthetic, device=model.device)
        self._labels = {
            name: (model.encode_texts(label.positive), model.encode_texts(label.negative)) for name, label in config.labels.items()
        }
        width = model.encode_texts(["an image"]).shape[1]
        if self._head is not None:
            self._head(model.encode_texts(["an image"]))  # raises for another width before the work starts
        fields = [field for field in config.score_columns if field.name != EMBEDDING]
        if config.keeps_embeddings:
            metadata = {"model": f"{config.model} {config.weights or ''}".strip()}
            fields.append(pa.field(EMBEDDING, pa.list_(pa.float16(), width), metadata=metadata))
        self.schema = pa.schema(fields)

    def shard(self, number: int) -> pa.Table:
        """The scores of a shard's samples; null for an unreadable image."""
        table = self._corpus.read(number, columns=("caption", "width", "height", "image_offset", "image_length"))
        self._result.computed += table.num_rows
        columns: dict[str, list[Any]] = {name: [None] * table.num_rows for name in self.schema.names}
        with closing(self._batches(number, table=table)) as batches:
            for start, images in batches:
                readable = [start + index for index, image in enumerate(images) if image is not None]
                self._result.unreadable += len(images) - len(readable)
                if readable:
                    found = [image for image in images if image is not None]
                    captions = [table.column("caption")[row].as_py() or "" for row in readable]
                    for name, values in self._scores(found, captions=captions).items():
                        for row, value in zip(readable, values, strict=True):
                            columns[name][row] = value
                self._progress(self._done + start + len(images))
        self._add_up(columns)
        return pa.Table.from_pydict(columns, schema=self.schema)

    def finished(self, samples: int) -> None:
        """The finished shards have this many samples."""
        self._done = samples
        self._progress(samples)

    def _scores(self, images: Sequence[Tensor], *, captions: Sequence[str]) -> dict[str, list[Any]]:
        embeddings = self._model.encode_images(images)
        scores: dict[str, Any] = {}
        if self._config.similarity:
            scores[SIMILARITY] = (embeddings * self._model.encode_texts(captions)).sum(dim=-1).tolist()
        if self._head is not None:
            scores[AESTHETIC] = self._head(embeddings).tolist()
        for name, (positive, negative) in self._labels.items():
            scores[name] = probability(embeddings, positive=positive, negative=negative, scale=self._model.scale).tolist()
        if self._config.keeps_embeddings:
            scores[EMBEDDING] = list(embeddings.half().cpu().numpy())
        return scores

    def _batches(self, number: int, *, table: pa.Table) -> Generator[tuple[int, list[Tensor | None]], None, None]:
        """(first row, preprocessed images) in batches; None for an unreadable image. The next batch is read in the background."""
        heights, widths, offsets, lengths = (integers(table, name).tolist() for name in ("height", "width", "image_offset", "image_length"))
        path = self._corpus.shards[number].path
        crops = [_crop(height, width=width, side=self._model.size) for height, width in zip(heights, widths, strict=True)]
        parts = [ByteRange(path, offset, length) for offset, length in zip(offsets, lengths, strict=True)]

        def load(start: int) -> tuple[int, list[Tensor | None]]:
            end = start + self._config.batch
            found = self._reader.read_parts(parts[start:end])
            images: dict[int, DecodeRequest] = {}
            for index, data in enumerate(found):
                if isinstance(data, BadShard):
                    raise data
                if not isinstance(data, OSError):
                    images[index] = DecodeRequest(bytes(data), [crops[start + index]])
            decoded = self._decoders.decode([*images.values()])
            preprocessed = dict(zip(images, self._threads.map(self._preprocessed, decoded), strict=True))
            return start, [preprocessed.get(index) for index in range(len(found))]

        return prefetched(load, range(0, len(parts), self._config.batch))

    def _preprocessed(self, decoded: Decoded) -> Tensor | None:
        return None if isinstance(decoded, str) else self._model.preprocess(decoded[0].transpose(1, 2, 0))

    def _add_up(self, columns: dict[str, list[Any]]) -> None:
        for name in self.schema.names:
            known = [value for value in columns[name] if value is not None]
            if name != EMBEDDING and known:
                self._sums[name] += sum(known)
                self._counts[name] += len(known)
                self._result.means[name] = self._sums[name] / self._counts[name]


def _crop(height: int, *, width: int, side: int) -> Crop:
    """The crop that scales an image down to the size needed."""
    factor = min(1.0, _DECODED_SIDE * side / max(min(height, width), 1))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return (*size, *size)


def _identity(config: ScoreConfig) -> dict[str, Any]:
    """What the scores depend on: the config, without the batch size, and the contents of its files."""
    files = [file for file in (model_file(config.model, weights=config.weights), config.aesthetic) if file is not None]
    kept = config.model_dump(mode="json", exclude={"batch", "device", "duplicates", "embeddings"})
    return {**kept, "embeddings": config.keeps_embeddings, "files": [file_digest(file) for file in files]}
