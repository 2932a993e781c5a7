"""The files that make a folder of shards a corpus: index.parquet, index.json, README.md, and manifest.json, which is written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.files import publish, publish_text
from dataprep.shards import Shard
from pipeline.digests import file_digest

FORMAT = 1
MANIFEST, INDEX, WIDS_INDEX, README, REPORT = "manifest.json", "index.parquet", "index.json", "README.md", "report.html"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the inputs: inputs = kept + Σ rejected. `notes` are sentences for people, `shards` is a count."""

    inputs: int
    kept: int
    rejected: dict[str, int]
    notes: list[str]
    shards: int


def config_hash(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode("utf-8")).hexdigest()


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a corpus. Raises ValueError, in one line, for anything else."""
    path = corpus / MANIFEST
    if not path.is_file():
        raise ValueError(f"{corpus}: not a corpus (it has no {MANIFEST}); `tim prepare` makes one")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); prepare the corpus again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {found} where this version reads format {FORMAT}")
    return manifest


def read_account(manifest: Mapping[str, Any]) -> Account:
    totals = manifest["totals"]
    return Account(
        inputs=totals["inputs"],
        kept=totals["kept"],
        rejected=dict(manifest["rejected"]),
        notes=list(manifest["notes"]),
        shards=len(manifest["shards"]),
    )


def write_corpus_files(
    out: Path, *, name: str, shards: Sequence[Shard], account: Account, identity: Mapping[str, Any], image_format: str
) -> dict[str, Any]:
    """Write the index, the list of shards and the card; returns the manifest, into which `identity` (config and sources) goes as it is."""
    index_digest = _write_index(out, shards=shards)
    wids = [{"url": shard.name, "nsamples": shard.count, "filesize": shard.bytes} for shard in shards]
    publish_text(out / WIDS_INDEX, _pretty({"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": wids}))
    publish_text(out / README, _card(name=name, account=account, image_format=image_format))
    return {
        "format": FORMAT,
        "name": name,
        "shards": [asdict(shard) for shard in shards],
        "index": {"name": INDEX, "sha256": index_digest},
        "totals": {
            "inputs": account.inputs,
            "kept": account.kept,
            "rejected": sum(account.rejected.values()),
            "bytes": sum(shard.bytes for shard in shards),
        },
        "rejected": account.rejected,
        "notes": account.notes,
        **identity,
        "config_hash": config_hash(identity["config"]),
    }


def write_manifest(out: Path, *, manifest: Mapping[str, Any]) -> None:
    """The file that makes the folder a corpus."""
    publish_text(out / MANIFEST, _pretty(manifest))


def kept_rows(table: pa.Table) -> pa.Table:
    return table.filter(table.column("key").is_valid())


def _write_index(out: Path, *, shards: Sequence[Shard]) -> str:
    """All kept rows, one row group a shard; returns the file's sha256."""
    schema = pq.read_schema(out / shards[0].table)
    with publish(out / INDEX) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for shard in shards:
            writer.write_table(kept_rows(pq.read_table(out / shard.table)), row_group_size=shard.count)
    return file_digest(out / INDEX)


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _card(*, name: str, account: Account, image_format: str) -> str:
    """A data set card whose header makes `datasets.load_dataset(FOLDER)` read the shards as WebDataset."""
    reasons = "".join(f"| {reason} | {count} |\n" for reason, count in account.rejected.items())
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: "*.tar"
---

# {name}

{account.kept} captioned pictures in {account.shards} WebDataset shard(s), prepared by `tim prepare` from {account.inputs} inputs.

| | |
| --- | --- |
| kept | {account.kept} |
{reasons}
A sample is `KEY.{image_format}`, `KEY.txt` (its caption) and `KEY.json`; `KEY.cls` is its class where there are classes.
`000000.parquet` has a row for every input of a shard, those that were rejected and why included; `index.parquet` has the kept ones
of all shards, with byte offsets.

```python
datasets.load_dataset("FOLDER")
datasets.load_dataset("webdataset", data_files="FOLDER/*.tar", streaming=True)
webdataset.WebDataset("FOLDER/{{000000..{account.shards - 1:06d}}}.tar")
```
"""
