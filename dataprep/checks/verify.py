"""`tim verify`: check a corpus against its manifest: digests, counts, tables against tars, every image decodable, unique keys.

The tars of an index have no digests: they are indexed again, which must give the same tables.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataprep.index_tars import KIND, read_foreign
from dataprep.job import begun_in
from dataprep.row_schema import MEMBERS
from dataprep.shards.manifest import INDEX, MANIFEST, README, REPORT, WIDS_INDEX, kept_rows, read_input_counts
from dataprep.shards.writer import number_of_file, with_mask_columns
from dataprep.sidecars.writer import check_sidecars, sidecar_files
from dataprep.sources.webdataset import open_tar
from dataprep.workers.pool import LocalPool
from pipeline.corpus.corpus import read_manifest
from pipeline.digests import file_digest, json_digest
from pipeline.errors import one_line
from pipeline.images import Rejection, read_image
from pipeline.images.masks import MASK_EXTENSION, fits, read_mask
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import TEMPORARY_SUFFIX, WORK
from pipeline.storage.tar import BlockReader
from pipeline.workers.pool import WorkerDied

_MANY = 20  # problems listed per shard


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked, and all problems found, one sentence each. An intact corpus has none."""

    problems: list[str]
    shards: int
    samples: int


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """A shard to check, as listed in the manifest. `crashes_at` ≥ 0: the sample that crashed the decoder."""

    corpus: Path
    entry: dict[str, Any]
    crashes_at: int = -1


def verify(corpus: str | Path, *, workers: int = 1, progress: Progress = no_progress) -> Report:
    """Check a corpus. Damage is reported; ValueError is raised if it is not a corpus. `progress`: ("verify", samples done, samples)."""
    corpus = Path(corpus)
    manifest = read_manifest(corpus)
    total = manifest["totals"]["kept"]
    is_growing = begun_in(corpus / WORK).get("grows") == json_digest(manifest)
    problems = _check_input_counts(manifest) + _check_files(corpus, manifest=manifest, is_growing=is_growing)

    def show(done: int) -> None:
        progress("verify", min(done, total), total)

    is_index = manifest.get("kind") == KIND
    checks = [ShardCheck(corpus=corpus, entry=entry) for entry in manifest["shards"]]
    with LocalPool(workers) as pool:
        for found in pool.map(check_foreign_shard if is_index else check_shard, checks, retry=_stop_before_crash, on_items=show):
            problems += found
    show(total)
    if not is_index:
        problems += _check_index(corpus, manifest=manifest, is_growing=is_growing)
    problems += check_sidecars(corpus)
    return Report(problems=problems, shards=len(checks), samples=total)


def check_shard(check: ShardCheck, report: Callable[[int], None]) -> list[str]:
    """All problems of one shard."""
    tar_path, table_path = check.corpus / check.entry["name"], check.corpus / check.entry["table"]
    missing = [f"{path.name}: is missing" for path in (tar_path, table_path) if not path.is_file()]
    if missing:
        return missing
    problems = _check_digest(tar_path, check.entry["sha256"]) + _check_digest(table_path, check.entry["table_sha256"])
    try:
        table = pq.read_table(table_path)
        kept = kept_rows(table).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        return [*problems, f"{table_path.name}: cannot be read: {one_line(error)}"]
    if len(kept) != check.entry["count"] or table.num_rows != check.entry["rows"]:
        problems.append(f"{table_path.name}: {len(kept)} of {table.num_rows} rows are kept, the manifest says {check.entry['count']}")
    details = [*_check_layout(tar_path, rows=kept), *_check_samples(tar_path, rows=kept, crashes_at=check.crashes_at, report=report)]
    return problems + _first(details, of=tar_path.name)


def check_foreign_shard(check: ShardCheck, report: Callable[[int], None]) -> list[str]:
    """All problems of one shard of an index."""
    name, table_path = check.entry["name"], check.corpus / check.entry["table"]
    if not table_path.is_file():
        return [f"{table_path.name}: is missing"]
    changed = _check_digest(table_path, check.entry["table_sha256"])
    if changed:
        return changed
    table = pq.read_table(table_path)
    crashed = frozenset(table.filter(pc.call_function("equal", [table["reason"], "crashed"]))["image_offset"].to_pylist())
    found, size = read_foreign(name, crashed=crashed)
    if size != check.entry["bytes"] or not found.table.equals(table):
        difference = next((row["detail"] for row in found.table.to_pylist() if row["path"] == name.rpartition("/")[2]), f"{size} bytes")
        return [f"{name}: does not match {table_path.name} ({difference}): the tar was changed or damaged, run `tim index` again"]
    problems = []
    with open_tar(name) as tar:
        for position, row in enumerate(kept_rows(table).to_pylist()):
            report(position)
            if position == check.crashes_at:
                problems.append(f"{name}: {row['key']}: its image crashes the decoder; the samples after it were not checked")
                break
            image = tar.at(row["image_offset"], row["image_length"])
            found = [*_check_image(image, row=row), *_check_foreign_mask(tar, row=row)]
            problems += [f"{name}: {row['key']}: {problem}" for problem in found]
    return _first(problems, of=name)


def _first(problems: list[str], *, of: str) -> list[str]:
    """The first problems, and the number of further ones."""
    more = len(problems) - _MANY
    return problems if more <= 0 else [*problems[:_MANY], f"{of}: and {more} more problems"]


def _check_digest(path: Path, expected: str) -> list[str]:
    return [] if file_digest(path) == expected else [f"{path.name}: its digest is not in the manifest: the file was changed or damaged"]


def _stop_before_crash(check: ShardCheck, death: WorkerDied) -> ShardCheck:
    if death.at < 0 or death.at == check.crashes_at:
        raise death
    return ShardCheck(corpus=check.corpus, entry=check.entry, crashes_at=death.at)


def _check_input_counts(manifest: dict[str, Any]) -> list[str]:
    counts, totals = read_input_counts(manifest), manifest["totals"]
    problems = []
    if counts.inputs != counts.kept + sum(counts.rejected.values()) or totals["rejected"] != sum(counts.rejected.values()):
        problems.append(f"{MANIFEST}: the input counts do not add up: {counts.inputs} inputs, {counts.kept} kept, {counts.rejected}")
    replaced = sum(sum(step["replaced"].values()) for step in manifest.get("growth", ()))  # rows of retried inputs
    rows = counts.inputs + replaced - sum(manifest.get("lost", {}).values())  # rows that a repair could not restore
    for what, total in (("count", counts.kept), ("bytes", totals["bytes"]), ("rows", rows)):
        if sum(shard[what] for shard in manifest["shards"]) != total:
            problems.append(f"{MANIFEST}: the shards' {what} do not add up to {total}")
    return problems


def _check_files(corpus: Path, *, manifest: dict[str, Any], is_growing: bool) -> list[str]:
    """Files that the manifest does not list, and missing marker files. Files of an unfinished append are not part of the corpus yet."""
    is_index = manifest.get("kind") == KIND
    known = {name for shard in manifest["shards"] for name in (shard["name"], shard["table"])} | (set() if is_index else {INDEX})
    known |= sidecar_files(corpus)
    found = {path.name for pattern in ("*.tar", "*.parquet", f"*{TEMPORARY_SUFFIX}") for path in corpus.glob(pattern)}
    problems = [f"{WORK}: an append is unfinished: run its command again; its shards were not checked"] if is_growing else []
    first = len(manifest["shards"])
    added = {name for name in found if name.endswith(TEMPORARY_SUFFIX) or (number_of_file(name) or 0) >= first} if is_growing else set()
    problems += [f"{name}: not in the manifest" for name in sorted(found - known - added)]
    markers = [shard["table"].removesuffix(".parquet") + "_stats.json" for shard in manifest["shards"]]
    markers += [] if is_index else [WIDS_INDEX, README, REPORT]
    problems += [f"{name}: is missing" for name in markers if not (corpus / name).is_file()]
    return problems


def _check_layout(tar_path: Path, *, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Compare the members of the tar, in order, with the offsets and lengths in the table."""
    extensions = {"text": "txt", "cls": "cls", "json": "json", "mask": MASK_EXTENSION}
    expected = []
    for row in rows:
        for member in MEMBERS:
            if row.get(f"{member}_offset") is not None:
                name = f"{row['key']}.{extensions.get(member, '')}"
                expected.append((name, row[f"{member}_offset"], row[f"{member}_length"]))
    try:
        with tarfile.open(tar_path, "r:") as tar:
            found = [(info.name, info.offset_data, info.size) for info in tar]
    except (tarfile.TarError, OSError, ValueError) as error:
        yield f"{tar_path.name}: cannot be read: {one_line(error)}"
        return
    if len(found) != len(expected):
        yield f"{tar_path.name}: {len(found)} members where the table has {len(expected)}"
    for (name, offset, length), (expected_name, expected_offset, expected_length) in zip(found, expected, strict=False):
        same_name = name == expected_name if not expected_name.endswith(".") else name.startswith(expected_name)
        if not same_name or (offset, length) != (expected_offset, expected_length):
            yield f"{tar_path.name}: {name} at byte {offset} does not match the table: {expected_name} at byte {expected_offset}"
    if len({row["key"] for row in rows}) != len(rows):
        yield f"{tar_path.name}: keys are repeated"


def _check_samples(tar_path: Path, *, rows: list[dict[str, Any]], crashes_at: int, report: Callable[[int], None]) -> Iterator[str]:
    """Read every member by its offset, as training does."""
    with open(tar_path, "rb") as tar:
        for position, row in enumerate(rows):
            report(position)
            if position == crashes_at:
                yield f"{tar_path.name}: {row['key']}: its image crashes the decoder; the samples after it were not checked"
                return
            yield from (f"{tar_path.name}: {row['key']}: {problem}" for problem in _check_sample(row, tar=tar))


def _check_sample(row: dict[str, Any], *, tar: Any) -> Iterator[str]:
    def payload(member: str) -> bytes:
        tar.seek(row[f"{member}_offset"])
        return tar.read(row[f"{member}_length"])

    yield from _check_image(payload("image"), row=row)
    if row.get("mask_offset") is not None:
        yield from _check_mask(payload("mask"), row=row)
    if payload("text") != row["caption"].encode("utf-8"):
        yield "its caption does not match the table"
    if row["cls_offset"] is not None and payload("cls") != str(row["label"]).encode("ascii"):
        yield "its class does not match the table"
    try:
        record = json.loads(payload("json"))
    except ValueError:
        yield "its JSON cannot be read"
        return
    compared = ("key", "caption", "captions", "width", "height", "sha256", *(["source"] if "source" in record else []))
    different = [name for name in compared if record.get(name) != row[name]]
    if different:
        yield f"its JSON differs from the table in {', '.join(different)}"


def _check_image(data: bytes, *, row: dict[str, Any]) -> Iterator[str]:
    try:
        image = read_image(data)
        if image.pixels.shape[:2] != (row["height"], row["width"]):
            yield f"its image is {image.pixels.shape[1]}x{image.pixels.shape[0]}, the table says {row['width']}x{row['height']}"
    except Rejection as rejection:
        yield f"its image cannot be read: {rejection}"


def _check_mask(data: bytes, *, row: dict[str, Any], is_foreign: bool = False) -> Iterator[str]:
    """Masks of prepared corpora have the size of their images, those of foreign tars their aspect ratio."""
    size = row["height"], row["width"]
    try:
        found = read_mask(data).shape[:2]
        if found != size and not (is_foreign and fits(found, size)):
            yield f"its mask is {found[1]}x{found[0]}, its image {size[1]}x{size[0]}"
    except Rejection as rejection:
        yield f"its mask cannot be read: {rejection}"


def _check_foreign_mask(tar: BlockReader, *, row: dict[str, Any]) -> Iterator[str]:
    if row.get("mask_offset") is not None:
        yield from _check_mask(tar.at(row["mask_offset"], row["mask_length"]), row=row, is_foreign=True)


def _check_index(corpus: Path, *, manifest: dict[str, Any], is_growing: bool) -> list[str]:
    """Check index.parquet: digest, one row group per shard with the kept rows of the shard, unique keys.

    An append publishes its index just before its manifest. That index begins with the row groups of the earlier corpus.
    """
    path = corpus / manifest["index"]["name"]
    if not path.is_file():
        return [f"{path.name}: is missing"]
    problems = _check_digest(path, manifest["index"]["sha256"])
    try:
        index = pq.ParquetFile(path)
        if is_growing and index.num_row_groups > len(manifest["shards"]):
            problems = []
        elif index.num_row_groups != len(manifest["shards"]):
            return [*problems, f"{path.name}: {index.num_row_groups} row groups for {len(manifest['shards'])} shards"]
        for group, shard in enumerate(manifest["shards"]):
            rows = index.read_row_group(group)
            if not all(key.startswith(shard["table"].removesuffix(".parquet")) for key in rows.column("key").to_pylist()):
                problems.append(f"{path.name}: a key of row group {group} does not belong to {shard['table']}: keys may be repeated")
            if (corpus / shard["table"]).is_file() and not rows.equals(
                with_mask_columns(kept_rows(pq.read_table(corpus / shard["table"])), rows.schema)
            ):
                problems.append(f"{path.name}: row group {group} does not match the kept rows of {shard['table']}")
    except (pa.ArrowException, KeyError, OSError) as error:
        problems.append(f"{path.name}: cannot be read: {one_line(error)}")
    return problems
