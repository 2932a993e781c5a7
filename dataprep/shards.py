"""One shard: a reproducible USTAR, its row table, and the stats file that commits both."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.chunks import ChunkTables
from dataprep.files import publish, publish_text
from dataprep.plan import ColumnKind, Entry
from dataprep.thumbnails import thumbnail
from pipeline.images import read_image

MEMBERS = ("image", "text", "cls", "json")
_SHOWN = 8  # near duplicates of a shard that have a thumbnail

_TABLE_FIELDS = [
    *((name, pa.string()) for name in ("key", "source", "path", "status", "reason", "detail")),
    *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
    ("caption", pa.string()),
    ("captions", pa.list_(pa.string())),
    ("label", pa.int32()),
    *((name, pa.string()) for name in ("sha256", "duplicate_of", "near_duplicate_of", "phash")),
    *((f"{member}_{what}", pa.int64()) for member in MEMBERS for what in ("offset", "length")),
    ("thumbnail", pa.binary()),  # of some rejected pictures, for the report
]
TABLE_COLUMNS = frozenset(name for name, _ in _TABLE_FIELDS)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What it takes to write one shard, in another process if need be."""

    number: int
    entries: list[Entry]
    tables: tuple[Path, ...]
    out: Path
    columns: dict[str, ColumnKind]
    has_classes: bool
    image_format: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard, as the manifest lists it; `sha256` is None where a tar is foreign and was not read as a whole."""

    name: str
    count: int
    bytes: int
    sha256: str | None
    table: str
    table_sha256: str
    table_bytes: int
    rows: int


def shard_name(number: int) -> str:
    return f"{number:06d}"


def table_schema(columns: Mapping[str, ColumnKind]) -> pa.Schema:
    return pa.schema([*_TABLE_FIELDS, *((name, kind.table) for name, kind in columns.items())])


def finished_shard(out: Path, *, number: int) -> Shard | None:
    """The shard if its stats file says that it is complete and both files are there in full length."""
    stem = shard_name(number)
    stats = out / f"{stem}_stats.json"
    if not stats.exists():
        return None
    shard = Shard(**json.loads(stats.read_text("utf-8"))["shard"])
    for name, size in ((shard.name, shard.bytes), (shard.table, shard.table_bytes)):
        if not (out / name).exists() or (out / name).stat().st_size != size:
            return None
    return shard


def write_shard(task: ShardTask, report: Callable[[int], None]) -> Shard:
    """Write tar, table and stats of one shard, in this order. Raises RuntimeError if a source changed since it was examined."""
    rows = ChunkTables(task.tables).rows(entry.position for entry in task.entries)
    work = task.tables[0].parent
    stem = shard_name(task.number)
    table_rows: list[dict[str, Any]] = []
    shown = 0
    with publish(task.out / f"{stem}.tar") as stream:
        digesting = _DigestingStream(stream)
        with tarfile.open(fileobj=digesting, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for entry in task.entries:
                row = rows[entry.position]
                table_row = _table_row(row, entry=entry, columns=task.columns)
                if entry.key:
                    report(entry.position)
                    image = _read_image(row, work=work)
                    table_row |= _write_sample(tar, row=row, entry=entry, image=image, task=task)
                elif entry.reason == "near-duplicate" and shown < _SHOWN:
                    shown += 1
                    table_row["thumbnail"] = thumbnail(read_image(_read_image(row, work=work)).pixels)
                table_rows.append(table_row)
    table = _table_bytes(table_rows, schema=table_schema(task.columns))
    with publish(task.out / f"{stem}.parquet") as stream:
        stream.write(table)
    kept = sum(bool(entry.key) for entry in task.entries)
    shard = Shard(
        name=f"{stem}.tar",
        count=kept,
        bytes=digesting.count,
        sha256=digesting.digest.hexdigest(),
        table=f"{stem}.parquet",
        table_sha256=hashlib.sha256(table).hexdigest(),
        table_bytes=len(table),
        rows=len(table_rows),
    )
    publish_text(task.out / f"{stem}_stats.json", _stats(table_rows, shard=shard))
    return shard


def sample_record(row: Mapping[str, Any], *, key: str, columns: Mapping[str, ColumnKind]) -> dict[str, Any]:
    """The content of KEY.json: img2dataset's names, then the sources' further columns; the same names and types in every sample."""
    extra = json.loads(row["extra"])
    record: dict[str, Any] = {
        "key": key,
        "url": extra["url"] if isinstance(extra.get("url"), str) else row["path"],
        "caption": row["caption"],
        "captions": row["captions"] or [""],
        "width": row["width"],
        "height": row["height"],
        "original_width": row["original_width"],
        "original_height": row["original_height"],
        "sha256": row["sha256"],
        "status": "success",
    }
    for name, kind in columns.items():
        if name not in record:
            record[name] = _typed(extra.get(name), kind=kind.table if kind.is_number_in_json else pa.string())
    return record


def _write_sample(tar: tarfile.TarFile, *, row: dict[str, Any], entry: Entry, image: bytes, task: ShardTask) -> dict[str, int]:
    """Add the members of one sample; returns their offsets and lengths by column name."""
    record = sample_record(row, key=entry.key, columns=task.columns)
    payloads = {
        "image": (task.image_format, image),
        "text": ("txt", row["caption"].encode("utf-8")),
        "cls": ("cls", str(row["label"]).encode("ascii")),
        "json": ("json", json.dumps(record, ensure_ascii=False).encode("utf-8")),
    }
    if not task.has_classes:
        del payloads["cls"]
    places: dict[str, int] = {}
    for member, (extension, payload) in payloads.items():
        info = tarfile.TarInfo(f"{entry.key}.{extension}")
        info.size, info.mode = len(payload), 0o644
        places[f"{member}_offset"], places[f"{member}_length"] = tar.offset + tarfile.BLOCKSIZE, len(payload)
        tar.addfile(info, io.BytesIO(payload))
    return places


def _read_image(row: dict[str, Any], *, work: Path) -> bytes:
    """The bytes to store: from a spool file of pass 1, or once more from the input's source, which must not have changed."""
    file = os.fsdecode(row["file"])
    try:
        with open(work / file if row["is_spooled"] else file, "rb") as stream:
            stream.seek(row["offset"])
            data = stream.read(row["length"])
    except OSError as error:
        raise RuntimeError(f"{row['source']}/{row['path']} can no longer be read: {error.strerror}") from error
    if not row["is_spooled"] and hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise RuntimeError(f"{row['source']}/{row['path']} changed while it was being prepared: delete the output folder and start again")
    return data


def _table_row(row: dict[str, Any], *, entry: Entry, columns: Mapping[str, ColumnKind]) -> dict[str, Any]:
    reason = entry.reason or row["reason"]
    extra = json.loads(row["extra"])
    sizes = ("width", "height", "original_width", "original_height")
    copied = ("source", "path", *sizes, "caption", "label", "sha256", "phash", "thumbnail")
    return {
        **{name: row[name] for name in copied},
        "key": entry.key or None,
        "status": "rejected" if reason else "success",
        "reason": reason,
        "detail": entry.detail or row["detail"],
        "captions": row["captions"] or ([""] if entry.key else []),
        "duplicate_of": entry.duplicate_of,
        "near_duplicate_of": entry.near_duplicate_of,
        **{name: _typed(extra.get(name), kind=kind.table) for name, kind in columns.items()},
    }


def _typed(value: Any, *, kind: pa.DataType) -> Any:
    """A value of a further column in the column's type; what is missing is "" among strings and None among numbers."""
    if kind != pa.string():
        return None if value is None else float(value) if kind == pa.float64() else value
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "replace").decode("utf-8")


def _table_bytes(rows: list[dict[str, Any]], *, schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd", row_group_size=len(rows))
    return buffer.getvalue()


def _stats(rows: list[dict[str, Any]], *, shard: Shard) -> str:
    """img2dataset's names where they have a meaning here, then our own."""
    reasons = Counter(row["reason"] for row in rows if row["reason"])
    stats = {
        "format": 1,
        "count": len(rows),
        "successes": shard.count,
        "failed_to_download": reasons["missing"],
        "failed_to_resize": len(rows) - shard.count - reasons["missing"],
        "status_dict": {"success": shard.count, **dict(sorted(reasons.items()))},
        "shard": asdict(shard),
    }
    return json.dumps(stats, indent=1) + "\n"


class _DigestingStream:
    """A write-only stream that hashes and counts what passes through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.count += len(data)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.count
