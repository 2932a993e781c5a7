"""One shard: a reproducible USTAR, its row table, and the stats file that commits both."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.examine.thumbnails import thumbnail
from dataprep.row_schema import MASK_FIELDS, TABLE_FIELDS
from dataprep.shards.layout import ColumnKind, ExtraColumns
from dataprep.shards.regroup import GROUP_SCHEMA, rows_of_shard
from dataprep.shards.store import Store
from pipeline.images import read_image
from pipeline.images.masks import MASK_EXTENSION, encode_mask

_MAX_THUMBNAILS = 8  # near duplicates of a shard that get one

_COPIED = [name for name, _ in TABLE_FIELDS if name in GROUP_SCHEMA.names]
_SHARD_FILE = re.compile(r"(\d{6,})(\.tar|\.parquet|_stats\.json)")
_OF_SHARD = re.compile(r"(\d{6,})(\.|_stats\.json)")
_TEXT = ColumnKind(table=pa.string(), is_number_in_json=False)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to write. `number`: its number in the corpus; `index`: its record batch in the `groups`."""

    number: int
    index: int
    groups: tuple[Path, ...]
    work: Path
    store: Store
    columns: ExtraColumns
    image_format: str
    job: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A finished shard, as listed in the manifest. `sha256` is None for a foreign tar, which is not read as a whole."""

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


def stats_name(number: int) -> str:
    return f"{shard_name(number)}_stats.json"


def shard_number(name: str) -> int | None:
    """The number of the shard that a tar, table or stats file belongs to; None for other names."""
    match = _SHARD_FILE.fullmatch(name)
    return int(match[1]) if match else None


def number_of_file(name: str) -> int | None:
    """As `shard_number`, but for the files of sidecars, too."""
    match = _OF_SHARD.match(name)
    return int(match[1]) if match else None


def table_schema(columns: ExtraColumns) -> pa.Schema:
    masks = MASK_FIELDS if columns.has_masks else ()
    return pa.schema([*TABLE_FIELDS, *masks, *((name, kind.table) for name, kind in columns.kinds.items())])


def with_mask_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table in the columns of `schema`: shards that were written before their corpus had masks lack those of masks."""
    for name, kind in MASK_FIELDS:
        if name in schema.names and name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, kind))
    return table.select(schema.names) if set(table.column_names) == set(schema.names) else table


def finished_shards(store: Store, *, first: int, count: int, job: str) -> list[ShardEntry | None]:
    """For each of `count` shards from `first` on: its entry if it is complete and of this job, else None.

    A shard is complete if its stats file exists and its tar and table have their full length.
    """
    sizes = store.sizes()

    def find(number: int) -> ShardEntry | None:
        name = stats_name(number)
        stats = json.loads(store.read(name)) if name in sizes else {}
        if stats.get("job") != job:
            return None
        shard = ShardEntry(**stats["shard"])
        return shard if (sizes.get(shard.name), sizes.get(shard.table)) == (shard.bytes, shard.table_bytes) else None

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(find, range(first, first + count)))


def write_shard(task: ShardTask, report: Callable[[int], None]) -> ShardEntry:
    """Write tar, table and stats of one shard, in this order. Raises RuntimeError if a source changed since it was examined."""
    stem = shard_name(task.number)
    tables: list[pa.Table] = []
    schema = table_schema(task.columns)
    kept = shown = 0
    with task.store.publish(f"{stem}.tar") as stream:
        digesting = _DigestingStream(stream)
        with tarfile.open(fileobj=digesting, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for rows in rows_of_shard(task.groups, shard=task.index):
                table_rows: list[dict[str, Any]] = []
                for row in rows:
                    table_row = _table_row(row, columns=task.columns)
                    if row["key"]:
                        report(kept)
                        kept += 1
                        table_row |= _write_sample(tar, row=row, image=_read_image(row, work=task.work), task=task)
                    elif row["reason"] == "near-duplicate" and shown < _MAX_THUMBNAILS:
                        shown += 1
                        table_row["thumbnail"] = thumbnail(read_image(_read_image(row, work=task.work)).pixels)
                    table_rows.append(table_row)
                tables.append(pa.Table.from_pylist(table_rows, schema=schema))
    written = pa.concat_tables(tables)
    table = table_bytes(written)
    with task.store.publish(f"{stem}.parquet") as stream:
        stream.write(table)
    shard = ShardEntry(
        name=f"{stem}.tar",
        count=kept,
        bytes=digesting.count,
        sha256=digesting.digest.hexdigest(),
        table=f"{stem}.parquet",
        table_sha256=hashlib.sha256(table).hexdigest(),
        table_bytes=len(table),
        rows=written.num_rows,
    )
    task.store.publish_text(stats_name(task.number), shard_stats(written, shard=shard, job=task.job))
    return shard


def sample_record(row: Mapping[str, Any], *, columns: Mapping[str, ColumnKind]) -> dict[str, Any]:
    """Content of KEY.json: img2dataset's names, the source, then its extra columns; the same names and types in every sample."""
    extra = json.loads(row["extra"])
    record: dict[str, Any] = {
        "key": row["key"],
        "url": extra["url"] if isinstance(extra.get("url"), str) else row["path"],
        "caption": row["caption"],
        "captions": row["captions"] or [""],
        "width": row["width"],
        "height": row["height"],
        "original_width": row["original_width"],
        "original_height": row["original_height"],
        "sha256": row["sha256"],
        "status": "success",
        "source": row["source"],
    }
    for name, kind in columns.items():
        if name not in record:
            record[name] = _typed(extra.get(name), kind=kind if kind.is_number_in_json else _TEXT)
    return record


def _write_sample(tar: tarfile.TarFile, *, row: dict[str, Any], image: bytes, task: ShardTask) -> dict[str, int]:
    """Add the members of one sample; returns their offsets and lengths by column name."""
    record = sample_record(row, columns=task.columns.kinds)
    if task.columns.has_masks:
        record["mask_path"] = row["mask_path"] or ""
    payloads = {
        "image": (task.image_format, image),
        "text": ("txt", row["caption"].encode("utf-8")),
        "cls": ("cls", str(row["label"]).encode("ascii")),
        "json": ("json", json.dumps(record, ensure_ascii=False).encode("utf-8")),
    }
    if not task.columns.has_classes:
        del payloads["cls"]
    if task.columns.has_masks:
        payloads["mask"] = (MASK_EXTENSION, _read_mask(row, work=task.work))
    columns: dict[str, int] = {}
    for member, (extension, payload) in payloads.items():
        info = tarfile.TarInfo(f"{row['key']}.{extension}")
        info.size, info.mode = len(payload), 0o644
        columns[f"{member}_offset"], columns[f"{member}_length"] = tar.offset + tarfile.BLOCKSIZE, len(payload)
        tar.addfile(info, io.BytesIO(payload))
    return columns


def _read_image(row: dict[str, Any], *, work: Path) -> bytes:
    """The bytes to store: from a spool file of pass 1, or reread from the source. Raises RuntimeError if the source has changed."""
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


def _read_mask(row: dict[str, Any], *, work: Path) -> bytes:
    """The mask of a sample, from the spool file of pass 1; white if it has none, so that all samples have the same members."""
    if not row["mask_path"]:
        return encode_mask(np.full((row["height"], row["width"]), 255, dtype=np.uint8))
    with open(work / os.fsdecode(row["mask_file"]), "rb") as stream:
        stream.seek(row["mask_start"])
        return stream.read(row["mask_bytes"])


def _table_row(row: dict[str, Any], *, columns: ExtraColumns) -> dict[str, Any]:
    extra = json.loads(row["extra"])
    return {
        **{name: row[name] for name in _COPIED},
        **({"mask_path": row["mask_path"] or ""} if columns.has_masks else {}),
        "key": row["key"] or None,
        "status": "rejected" if row["reason"] else "success",
        "captions": row["captions"] or ([""] if row["key"] else []),
        **{name: _typed(extra.get(name), kind=kind) for name, kind in columns.kinds.items()},
    }


def _typed(value: Any, *, kind: ColumnKind) -> Any:
    """A value in its column's type. A missing or mistyped value becomes "" in a string column and None in a number column."""
    if kind.table != pa.string():
        return None if value is None or not kind.holds(value) else float(value) if kind.table == pa.float64() else value
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "replace").decode("utf-8")


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=table.num_rows)
    return buffer.getvalue()


def shard_stats(table: pa.Table, *, shard: ShardEntry, job: str) -> str:
    """The stats file: img2dataset's names where they apply, then our own."""
    reasons = Counter(reason for reason in table.column("reason").to_pylist() if reason)
    stats = {
        "format": 1,
        "count": shard.rows,
        "successes": shard.count,
        "failed_to_download": reasons["missing"],
        "failed_to_resize": shard.rows - shard.count - reasons["missing"],
        "status_dict": {"success": shard.count, **dict(sorted(reasons.items()))},
        "job": job,
        "shard": asdict(shard),
    }
    return json.dumps(stats, indent=1) + "\n"


class _DigestingStream:
    """A write-only stream that hashes and counts the bytes written."""

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
