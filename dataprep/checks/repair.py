"""Repair of a corpus (`tim verify`): rebuild the files that can be derived from others, and report what is lost.

The kept rows of a lost table are in index.parquet, and most of their values in the shard's tar; rejected rows are in the table only. All
other files are derived from tables and tars. A lost tar cannot be rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataprep.dedup.perceptual import perceptual_hash
from dataprep.index_tars import KIND
from dataprep.job import begun_in
from dataprep.report.html import ReportConfig, corpus_statistics, render
from dataprep.row_schema import TABLE_COLUMNS
from dataprep.shards.layout import ColumnKind, ExtraColumns
from dataprep.shards.manifest import (
    INDEX,
    MANIFEST,
    README,
    REPORT,
    WIDS_INDEX,
    InputCounts,
    count_entries,
    read_columns,
    read_input_counts,
    write_corpus_files,
)
from dataprep.shards.store import open_store
from dataprep.shards.writer import ShardEntry, shard_name, shard_number, shard_stats, table_bytes, table_schema
from dataprep.workers.pool import LocalPool, Pool
from pipeline.corpus.corpus import FORMAT, read_manifest
from pipeline.corpus.record_fields import IMAGE_EXTENSIONS
from pipeline.digests import file_digest
from pipeline.errors import one_line
from pipeline.images import Rejection, read_image
from pipeline.images.masks import MASK_EXTENSION
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import WORK, exclusive_lock, publish, publish_text
from pipeline.storage.tar import BlockReader, Member, members

_FILES = (INDEX, WIDS_INDEX, README, REPORT, MANIFEST)
_NOT_IN_TAR = ("detail", "duplicate_of", "near_duplicate_of")  # "" in a row rebuilt from a tar
_KINDS = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), "txt": "text", "cls": "cls", "json": "json", MASK_EXTENSION: "mask"}


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was rebuilt and what is lost, one sentence each."""

    done: list[str]
    lost: list[str]


@dataclass(frozen=True, slots=True)
class TableTask:
    """A shard whose rows to read from its tar. `skip`: positions of images that crashed the decoder."""

    tar: Path
    columns: ExtraColumns
    skip: frozenset[int] = frozenset()


def repair(corpus: str | Path, *, workers: int = 1, progress: Progress = no_progress) -> Repaired:
    """Rebuild missing or damaged files that can be derived; intact files keep their bytes. `progress`: ("repair", shards done, shards).

    Raises ValueError if `corpus` is not a corpus, is unfinished, was written by `tim index`, or is not in a local folder.
    """
    store, _ = open_store(corpus, work=None)
    folder = Path(store.location)
    if store.is_remote or not folder.is_dir():
        raise ValueError(f"{corpus}: not a local folder; copy the corpus to one to repair it")
    if begun_in(folder / WORK):
        raise ValueError(f"{corpus}: a preparation is unfinished: run its command again, or delete {folder / WORK}")
    done: list[str] = []
    lost: list[str] = []
    manifest = _manifest(folder, lost=lost)
    if manifest.get("kind") == KIND:
        raise ValueError(f"{corpus}: tables of an index cannot be repaired: run `tim index` again with the same tars")
    before = {name: _digest(folder / name) for name in _FILES}
    with exclusive_lock(folder) as work, LocalPool(workers) as pool:
        shards = _repair_tables(folder, manifest=manifest, pool=pool, progress=progress, done=done, lost=lost)
        if shards is not None:
            rejected_lost = {**manifest.get("lost", {}), **_rows_lost(manifest, shards=shards)}
            identity = {name: manifest[name] for name in ("config", "sources", "against") if name in manifest}
            config = ReportConfig.model_validate(manifest["config"].get("report", {}))
            write_corpus_files(
                store,
                name=manifest["name"],
                shards=shards,
                counts=read_input_counts(manifest),
                columns=read_columns(manifest),
                identity=identity | ({"lost": rejected_lost} if rejected_lost else {}),
                image_format=manifest["config"].get("images", {}).get("format", "jpg"),
                report=lambda written: render([corpus_statistics(folder, manifest=written, config=config, pool=pool)], config=config),
                append_history=manifest.get("growth", ()),
            )
        shutil.rmtree(work)
    done += [f"{name}: rebuilt" for name in _FILES if _digest(folder / name) != before[name]]
    return Repaired(done=done, lost=lost)


def read_table(task: TableTask, report: Callable[[int], None]) -> pa.Table:
    """The kept rows of a shard, rebuilt from its tar."""
    with open(task.tar, "rb") as stream:
        descriptor = stream.fileno()
        file = BlockReader(lambda offset, length: os.pread(descriptor, length, offset), size=os.fstat(descriptor).st_size)
        samples: dict[str, dict[str, Member]] = {}
        for member in members(file, tar=task.tar.name):
            if member.extension in _KINDS and member.problem is None:
                samples.setdefault(member.key, {})[_KINDS[member.extension]] = member
        rows = []
        for position, (key, found) in enumerate(samples.items()):
            report(position)
            payloads = {what: os.pread(descriptor, member.length, member.offset) for what, member in found.items()}
            rows.append(_row(key, found=found, payloads=payloads, columns=task.columns, hashed=position not in task.skip))
    return pa.Table.from_pylist(rows, schema=table_schema(task.columns))


def _row(key: str, *, found: Mapping[str, Member], payloads: Mapping[str, bytes], columns: ExtraColumns, hashed: bool) -> dict[str, Any]:
    record = json.loads(payloads["json"])
    if "://" not in record["url"]:  # an input without a URL has its path there
        record = {**record, "url": "", "path": record["url"]}
    masked = {"mask_path": record.get("mask_path", "")} if columns.has_masks else {}
    copied = ("caption", "captions", "width", "height", "original_width", "original_height", "sha256")
    return {
        **dict.fromkeys(_NOT_IN_TAR, ""),
        **{name: record[name] for name in copied},
        "source": record.get("source", ""),  # older shards do not name it
        **masked,
        "key": key,
        "path": record.get("path") or record["url"],
        "status": "success",
        "reason": "",
        "label": int(payloads["cls"]) if "cls" in payloads else None,
        "phash": _hash(payloads["image"]) if hashed else "",
        **{f"{what}_{name}": getattr(member, name) for what, member in found.items() for name in ("offset", "length")},
        **{name: _column(record[name], kind=kind) for name, kind in columns.kinds.items() if name in record},
    }


def _hash(image: bytes) -> str:
    try:
        value = perceptual_hash(read_image(image).pixels)
    except Rejection:
        return ""
    return "" if value is None else f"{value:016x}"


def _column(value: Any, *, kind: ColumnKind) -> Any:
    """A value in the type of its table column; the JSON of a sample may hold it as a string."""
    if kind.table == pa.string() or not isinstance(value, str):
        return value
    return json.loads(value) if value else None


def _repair_tables(
    folder: Path, *, manifest: Mapping[str, Any], pool: Pool, progress: Progress, done: list[str], lost: list[str]
) -> list[ShardEntry] | None:
    """All shards with intact tables and stats; None if a table cannot be rebuilt."""
    shards = [ShardEntry(**entry) for entry in manifest["shards"]]
    broken = [number for number, shard in enumerate(shards) if _digest(folder / shard.table) != shard.table_sha256]
    tables: dict[int, tuple[pa.Table, str]] = {}
    if broken and "index" in manifest and _digest(folder / INDEX) == manifest["index"]["sha256"]:
        index = pq.ParquetFile(folder / INDEX)
        tables = {number: (index.read_row_group(number), INDEX) for number in broken}
    else:
        whole = [number for number in broken if _digest(folder / shards[number].name) == shards[number].sha256]
        tasks = [TableTask(tar=folder / shards[number].name, columns=read_columns(manifest)) for number in whole]
        found = pool.map(read_table, tasks, retry=lambda task, death: replace(task, skip=task.skip | {death.at}))
        for index, (number, table) in enumerate(zip(whole, found, strict=True)):
            tables[number] = (table, shards[number].name)
            lost.append(f"{shards[number].table}: details of its samples, and which of them are near duplicates")
            progress("repair", index + 1, len(whole))
    for number in broken:
        shard = shards[number]
        if number not in tables:
            lost.append(f"{shard.table}: both it and {shard.name} are damaged: restore one of them, or prepare the corpus again")
            continue
        table, origin = tables[number]
        done.append(f"{shard.table}: rebuilt from {origin}")
        if shard.rows > table.num_rows:
            lost.append(f"{shard.table}: which inputs were rejected, and why: {shard.rows - table.num_rows} rows")
        shards[number] = _write_table(folder, shard=shard, table=table)
    for shard in shards:
        if _digest(folder / shard.table) == shard.table_sha256:
            done += _repair_stats(folder, shard=shard)
        if not (folder / shard.name).is_file():
            lost.append(f"{shard.name}: {shard.count} samples: restore the file, or prepare the corpus again")
    return shards if len(tables) == len(broken) else None


def _write_table(folder: Path, *, shard: ShardEntry, table: pa.Table) -> ShardEntry:
    data = table_bytes(table)
    with publish(folder / shard.table) as stream:
        stream.write(data)
    return replace(shard, table_sha256=hashlib.sha256(data).hexdigest(), table_bytes=len(data), rows=table.num_rows)


def _repair_stats(folder: Path, *, shard: ShardEntry) -> Iterator[str]:
    """An intact stats file keeps its counts of rejected inputs, though their rows may be lost."""
    path = folder / f"{shard.table.removesuffix('.parquet')}_stats.json"
    stats = _read_json(path)
    if stats.get("shard") == asdict(shard):
        return
    if "status_dict" in stats:
        publish_text(path, json.dumps({**stats, "shard": asdict(shard)}, indent=1) + "\n")
    else:
        neighbours = (_read_json(other).get("job") for other in sorted(folder.glob("[0-9]*_stats.json")))
        job = next((job for job in neighbours if job), "")
        publish_text(path, shard_stats(pq.ParquetFile(folder / shard.table).read(), shard=shard, job=job))
    yield f"{path.name}: rebuilt"


def _manifest(folder: Path, *, lost: list[str]) -> dict[str, Any]:
    """The manifest, or one rebuilt from stats files or tables. Raises ValueError if the folder is not a corpus."""
    if _read_json(folder / MANIFEST):
        return read_manifest(folder)
    numbers = sorted({number for path in folder.iterdir() if (number := shard_number(path.name)) is not None})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"{folder}: not a corpus: it has no {MANIFEST}, and no shards from 000000 on without a gap")
    shards: list[ShardEntry] = []
    counts: Counter[str] = Counter()
    for number in numbers:
        shard, reasons = _shard(folder, number=number)
        shards.append(shard)
        counts.update(reasons)
    kept = counts.pop("success", 0)
    input_counts = InputCounts(inputs=kept + counts.total(), kept=kept, rejected=dict(sorted(counts.items())), notes=[], shards=len(shards))
    lost.append(f"{MANIFEST}: the settings, sources and notes of the preparation: the corpus can be used, but not appended to")
    columns, image_format = _seen_columns(folder, shards=shards)
    return {
        "format": FORMAT,
        "name": _read_json(folder / WIDS_INDEX).get("name") or folder.resolve().name,
        "shards": [asdict(shard) for shard in shards],
        **count_entries(input_counts, shards=shards),
        **columns,
        "config": {"images": {"format": image_format}},
        "sources": [],
        "against": [],
    }


def _shard(folder: Path, *, number: int) -> tuple[ShardEntry, dict[str, int]]:
    """A shard and its numbers of kept ("success") and rejected inputs by reason, from its stats file or else its table."""
    stem = shard_name(number)
    stats = _read_json(folder / f"{stem}_stats.json")
    with suppress(KeyError, TypeError):
        return ShardEntry(**stats["shard"]), dict(stats["status_dict"])
    try:
        table = pq.ParquetFile(folder / f"{stem}.parquet").read()
        tar = folder / f"{stem}.tar"
        reasons = Counter(reason or "success" for reason in table.column("reason").to_pylist())
        shard = ShardEntry(
            name=tar.name,
            count=reasons["success"],
            bytes=tar.stat().st_size,
            sha256=file_digest(tar),
            table=f"{stem}.parquet",
            table_sha256=file_digest(folder / f"{stem}.parquet"),
            table_bytes=(folder / f"{stem}.parquet").stat().st_size,
            rows=table.num_rows,
        )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: without {MANIFEST} and {stem}_stats.json a repair needs {stem}.parquet: {one_line(error)}") from error
    return shard, dict(reasons)


def _seen_columns(folder: Path, *, shards: Sequence[ShardEntry]) -> tuple[dict[str, Any], str]:
    """(the manifest's entries on columns, extension of the images), read from a table and a sample."""
    for shard in shards:
        with suppress(OSError, KeyError, ValueError, pa.ArrowException):
            file = pq.ParquetFile(folder / shard.table)
            (row,) = (
                file.read(columns=["key", "json_offset", "json_length", "cls_offset"])
                .filter(pc.field("key").is_valid())
                .slice(0, 1)
                .to_pylist()
            )
            with open(folder / shard.name, "rb") as tar:
                record = json.loads(os.pread(tar.fileno(), row["json_length"], row["json_offset"]))
                image = tarfile.TarInfo.frombuf(os.pread(tar.fileno(), tarfile.BLOCKSIZE, 0), "utf-8", "replace").name
            types = {each.name: str(each.type) for each in file.schema_arrow if each.name not in TABLE_COLUMNS}
            kinds = {
                name: {"type": kind, "number": kind != "string" and not isinstance(record.get(name), str)} for name, kind in types.items()
            }
            masks = {"has_masks": True} if "mask_offset" in file.schema_arrow.names else {}
            return {"columns": kinds, "has_classes": row["cls_offset"] is not None, **masks}, image.rpartition(".")[2]
    raise ValueError(f"{folder}: no shard has both a table and a tar that can be read: prepare the corpus again")


def _rows_lost(manifest: Mapping[str, Any], *, shards: Sequence[ShardEntry]) -> dict[str, int]:
    """Table → number of lost rows of rejected inputs."""
    pairs = zip(manifest["shards"], shards, strict=True)
    return {shard.table: entry["rows"] - shard.rows for entry, shard in pairs if entry["rows"] > shard.rows}


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest(path: Path) -> str:
    """sha256 of a file, "" if it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return ""
