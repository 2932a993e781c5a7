"""Small corpora written in the prepared format (docs/formats.md) by the shortest code that does it, independent of dataprep."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.corpus.corpus import Corpus

_MEMBERS = [f"{member}_{what}" for member in ("image", "text", "cls", "json") for what in ("offset", "length")]
SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("key", "source", "path", "status", "reason", "detail")],
        *[(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")],
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.int32()),
        *[(name, pa.string()) for name in ("sha256", "near_duplicate_of", "phash")],
        *[(name, pa.int64()) for name in _MEMBERS],
    ]
)


@dataclass(frozen=True)
class Sample:
    """What a test corpus is made of."""

    height: int
    width: int
    captions: tuple[str, ...] = ()
    label: int | None = None


def image(height: int, width: int, *, seed: int) -> np.ndarray:
    """A smooth colour gradient, different for every seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))


def write_corpus(folder: Path, *, shards: Sequence[Sequence[Sample]], images: bool = True, name: str = "corpus") -> Corpus:
    """Write a corpus with JPEG tars, or with empty tars where only its tables count, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format": 1, "name": name, "shards": [], "totals": {}, "rejected": {}, "notes": [], "config": {}, "config_hash": ""}
    with pq.ParquetWriter(folder / "index.parquet", SCHEMA, compression="zstd") as index:
        for number, samples in enumerate(shards):
            tar = folder / f"{number:06d}.tar"
            rows = [_row(sample, key=f"{number:06d}{i:04d}") for i, sample in enumerate(samples)]
            tar.write_bytes(_tar(samples, rows=rows, seed=1000 * number) if images else b"")
            table = pa.Table.from_pylist(rows, schema=SCHEMA)
            pq.write_table(table, tar.with_suffix(".parquet"), compression="zstd")
            index.write_table(table)
            manifest["shards"].append(
                {
                    "name": tar.name,
                    "count": len(samples),
                    "bytes": tar.stat().st_size,
                    "sha256": _digest(tar),
                    "table": tar.with_suffix(".parquet").name,
                    "table_sha256": _digest(tar.with_suffix(".parquet")),
                }
            )
    manifest["index"] = {"name": "index.parquet", "sha256": _digest(folder / "index.parquet")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Corpus.open(folder)


def varied(count: int, *, seed: int) -> list[Sample]:
    """Images of 16 to 79 pixels a side, with one to three captions each."""
    sides = np.random.default_rng(seed).integers(16, 80, (count, 2)).tolist()
    return [Sample(height, width, tuple(f"caption {k} of {i}" for k in range(1 + i % 3)), i) for i, (height, width) in enumerate(sides)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """24 images of 16 to 79 pixels a side in two shards, with one to three captions each."""
    samples = varied(24, seed=0)
    return write_corpus(tmp_path / "corpus", shards=[samples[:14], samples[14:]])


@pytest.fixture
def damage() -> Callable[[Corpus, int, int], str]:
    """Overwrite the middle of one image in its tar, which keeps its length; gives back the sample's id."""

    def overwrite(corpus: Corpus, shard: int, row: int) -> str:
        table = corpus.read(shard, columns=("key", "image_offset", "image_length")).slice(row, 1).to_pylist()[0]
        with open(corpus.shards[shard].path, "r+b") as tar:
            tar.seek(table["image_offset"])
            tar.write(b"\0" * table["image_length"])
        return f"{corpus.name}/{table['key']}"

    return overwrite


def _row(sample: Sample, *, key: str) -> dict:
    texts = dict.fromkeys(("source", "path", "reason", "detail", "sha256", "near_duplicate_of", "phash"), "")
    sizes = {"width": sample.width, "height": sample.height, "original_width": sample.width, "original_height": sample.height}
    caption = sample.captions[0] if sample.captions else ""
    return {
        "key": key,
        **texts,
        "status": "success",
        **sizes,
        "caption": caption,
        "captions": list(sample.captions),
        "label": sample.label,
        **dict.fromkeys(_MEMBERS),
    }


def _tar(samples: Sequence[Sample], *, rows: Sequence[dict], seed: int) -> bytes:
    """USTAR bytes; payload offsets and lengths are noted in `rows`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            jpeg = io.BytesIO()
            Image.fromarray(image(sample.height, sample.width, seed=seed + i)).save(jpeg, "JPEG", quality=95)
            text = {"key": row["key"], "caption": row["caption"], "captions": row["captions"]}
            members = {"image": ("jpg", jpeg.getvalue())}
            if sample.captions:
                members["text"] = ("txt", row["caption"].encode())
            if sample.label is not None:
                members["cls"] = ("cls", str(sample.label).encode())
            members["json"] = ("json", json.dumps(text).encode())
            for member, (extension, data) in members.items():
                header = tarfile.TarInfo(f"{row['key']}.{extension}")
                header.size = len(data)
                row[f"{member}_offset"], row[f"{member}_length"] = buffer.tell() + 512, len(data)
                tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
