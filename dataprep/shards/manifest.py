"""The files that describe a corpus: index.parquet, index.json, README.md, report.html, and manifest.json, which is written last."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.shards.layout import ColumnKind, ExtraColumns
from dataprep.shards.store import Store
from dataprep.shards.writer import ShardEntry, table_schema, with_mask_columns
from dataprep.workers.prefetch import prefetched
from pipeline.corpus.corpus import FORMAT
from pipeline.corpus.sidecars import SIDECARS
from pipeline.digests import file_digest, json_digest

MANIFEST, INDEX, WIDS_INDEX, README, REPORT = "manifest.json", "index.parquet", "index.json", "README.md", "report.html"
_READ_AHEAD = 4


@dataclass(frozen=True, slots=True)
class InputCounts:
    """Outcome of the inputs: inputs = kept + Σ rejected. `notes`: sentences for people. `shards`: their number."""

    inputs: int
    kept: int
    rejected: dict[str, int]
    notes: list[str]
    shards: int


def count_entries(counts: InputCounts, *, shards: Sequence[ShardEntry]) -> dict[str, Any]:
    """The manifest's entries for the input counts, as read by `read_input_counts`."""
    totals = {"inputs": counts.inputs, "kept": counts.kept, "rejected": sum(counts.rejected.values())}
    totals["bytes"] = sum(shard.bytes for shard in shards)
    return {"totals": totals, "rejected": counts.rejected, "notes": counts.notes}


def read_input_counts(manifest: Mapping[str, Any]) -> InputCounts:
    totals = manifest["totals"]
    return InputCounts(
        inputs=totals["inputs"],
        kept=totals["kept"],
        rejected=dict(manifest["rejected"]),
        notes=list(manifest["notes"]),
        shards=len(manifest["shards"]),
    )


def write_corpus_files(
    store: Store,
    *,
    name: str,
    shards: Sequence[ShardEntry],
    counts: InputCounts,
    columns: ExtraColumns,
    identity: Mapping[str, Any],
    image_format: str,
    report: Callable[[dict[str, Any]], str],
    append_history: Sequence[Mapping[str, Any]] = (),
    sidecars: str = "",
) -> None:
    """Write the index, both lists of shards, the card and the report, and publish them one right after the other, the manifest last.

    `identity` (config and sources) is copied into the manifest. `append_history`: one entry per append, see `dataprep.append`. `report`
    renders the report from the manifest. `sidecars`: the new text of their list, if it changes.
    """
    wids = [{"url": shard.name, "nsamples": shard.count, "filesize": shard.bytes} for shard in shards]
    with ExitStack() as files:  # left in reverse order
        manifest_file = files.enter_context(store.publish(MANIFEST))
        index_file = files.enter_context(store.publish(INDEX))
        schema = table_schema(columns)
        with pq.ParquetWriter(index_file, schema, compression="zstd") as writer:
            for shard, table in zip(shards, read_tables(store, shards=shards), strict=True):
                writer.write_table(with_mask_columns(kept_rows(table), schema), row_group_size=max(1, shard.count))
        index_file.flush()
        manifest = {
            "format": FORMAT,
            "name": name,
            "shards": [asdict(shard) for shard in shards],
            "index": {"name": INDEX, "sha256": file_digest(Path(index_file.name))},
            **count_entries(counts, shards=shards),
            "columns": {column: {"type": str(kind.table), "number": kind.is_number_in_json} for column, kind in columns.kinds.items()},
            "has_classes": columns.has_classes,
            **({"has_masks": True} if columns.has_masks else {}),
            **identity,
            "config_hash": json_digest(identity["config"]),
            **({"growth": list(append_history)} if append_history else {}),
        }
        manifest_file.write(_pretty(manifest))
        lists = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": wids}
        if sidecars:
            files.enter_context(store.publish(SIDECARS)).write(sidecars.encode("utf-8"))
        files.enter_context(store.publish(WIDS_INDEX)).write(_pretty(lists))
        files.enter_context(store.publish(REPORT)).write(report(manifest).encode("utf-8"))
        files.enter_context(store.publish(README)).write(
            _card(name=name, counts=counts, columns=columns, image_format=image_format).encode("utf-8")
        )


def read_columns(manifest: Mapping[str, Any]) -> ExtraColumns:
    """The extra columns of a corpus."""
    types = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
    kinds = {name: ColumnKind(table=types[kind["type"]], is_number_in_json=kind["number"]) for name, kind in manifest["columns"].items()}
    return ExtraColumns(kinds=kinds, has_classes=manifest["has_classes"], has_masks=manifest.get("has_masks", False))


def read_tables(store: Store, *, shards: Sequence[ShardEntry], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The tables of the shards in order, with a few read ahead."""

    def read(shard: ShardEntry) -> pa.Table:
        return pq.ParquetFile(io.BytesIO(store.read(shard.table))).read(columns=columns)

    return prefetched(read, shards, by=_READ_AHEAD)


def kept_rows(table: pa.Table) -> pa.Table:
    return table.filter(table.column("key").is_valid())


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _card(*, name: str, counts: InputCounts, columns: ExtraColumns, image_format: str) -> str:
    """A dataset card whose header makes `datasets.load_dataset(FOLDER)` read the shards as WebDataset."""
    masks = "\n`KEY.mask.png` is its loss mask: white where the image is trained." if columns.has_masks else ""
    reasons = "".join(f"| {reason} | {count} |\n" for reason, count in counts.rejected.items())
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: "*.tar"
---

# {name}

{counts.kept} captioned images in {counts.shards} WebDataset shard(s), prepared by `tim prepare` from {counts.inputs} inputs.

| | |
| --- | --- |
| kept | {counts.kept} |
{reasons}
A sample is `KEY.{image_format}`, `KEY.txt` (its caption) and `KEY.json`; `KEY.cls` is its class where there are classes.{masks}
`000000.parquet` has one row per input of the shard, including rejected inputs with their reasons; `index.parquet` has the kept
rows of all shards, with byte offsets.

```python
datasets.load_dataset("FOLDER")
datasets.load_dataset("webdataset", data_files="FOLDER/*.tar", streaming=True)
webdataset.WebDataset("FOLDER/{{000000..{counts.shards - 1:06d}}}.tar")
```
"""
