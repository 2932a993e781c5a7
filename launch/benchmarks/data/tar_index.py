"""Benchmark `tim bench index`: indexing speed for tars of other tools on one core, and time and memory of a plan over very many rows.

The tars are synthetic with very small images, because the benchmark measures the work per sample, not per byte.
"""

from __future__ import annotations

import io
import json
import resource
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dataprep.index_tars import IndexTask, index_shard, read_foreign
from pipeline.corpus.corpus import Corpus
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.progress import Progress

Data = dict[str, Any]
ROWS_PER_SHARD = 10_000
FEW_ROWS = 10_000_000


def bench_index(*, samples: int, rows: int, repeats: int, progress: Progress) -> Data:
    """Samples per second of one process by tar layout, and seconds and memory from opening a corpus of `rows` to its first step."""
    layouts = {
        "jpg and txt, ustar": (("jpg", "txt"), tarfile.USTAR_FORMAT, False),
        "jpg, txt and json, ustar": (("jpg", "txt", "json"), tarfile.USTAR_FORMAT, False),
        "jpg, txt and json, pax": (("jpg", "txt", "json"), tarfile.PAX_FORMAT, False),
        "img2dataset with its table": (("jpg", "txt", "json"), tarfile.PAX_FORMAT, True),
    }
    indexed_per_second: dict[str, float] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, (name, (extensions, format, has_table)) in enumerate(layouts.items()):
            tar = _write_tar(folder / f"{number}.tar", samples=samples, extensions=extensions, format=format, has_table=has_table)
            task = IndexTask(number=number, tar=str(tar), out=folder)
            seconds = min(_seconds(index_shard, task, lambda offset: None) for _ in range(repeats))
            indexed_per_second[name] = samples / seconds
            progress("indexing", number + 1, len(layouts) + 1)
        seconds = min(_seconds(_list_with_tarfile, folder / "1.tar") for _ in range(repeats))
        table = read_foreign(str(folder / "0.tar"))[0].table
        few = _open_and_plan(folder / "few", table=table, rows=min(FEW_ROWS, rows))
        many = _open_and_plan(folder / "many", table=table, rows=rows)
        progress("indexing", len(layouts) + 1, len(layouts) + 1)
    return {
        "samples": samples,
        "indexed_per_second": indexed_per_second,
        "tarfile_listing_per_second": samples / seconds,
        f"{min(FEW_ROWS, rows):,}_rows": few,
        f"{rows:,}_rows": many,
    }


def _seconds(function: Any, *arguments: Any) -> float:
    """CPU seconds of a call, which do not depend on other load of the machine."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def _list_with_tarfile(path: Path) -> None:
    with tarfile.open(path, "r:") as tar:
        assert sum(1 for _ in tar)


def _write_tar(path: Path, *, samples: int, extensions: tuple[str, ...], format: int, has_table: bool) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 0)).save(buffer, "JPEG")
    record = {"url": "https://example.org/image.jpg", "caption": "a small image", "width": 32, "height": 32, "similarity": 0.3}
    files = {"jpg": buffer.getvalue(), "txt": b"a small image", "json": json.dumps(record).encode()}
    with tarfile.open(path, "w", format=format) as tar:
        for number in range(samples):
            for extension in extensions:
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size, info.mtime = len(files[extension]), time.time()
                tar.addfile(info, io.BytesIO(files[extension]))
    if has_table:
        keys = [f"{number:09d}" for number in range(samples)]
        columns = {name: [value] * samples for name, value in record.items()}
        pq.write_table(pa.table({"key": keys, "status": ["success"] * samples, **columns}), path.with_suffix(".parquet"))
    return path


def _open_and_plan(folder: Path, *, table: pa.Table, rows: int) -> Data:
    """Open and plan a corpus in which all shards share one table."""
    folder.mkdir()
    count = min(ROWS_PER_SHARD, rows)
    pq.write_table(table.take(np.arange(count) % len(table)), folder / "000000.parquet", compression="zstd")
    entry = {"count": count, "bytes": 10**9, "sha256": None, "table": "000000.parquet", "table_sha256": "0" * 64}
    shards = [{"name": f"s3://bucket/laion/{number:06d}.tar", **entry} for number in range(-(-rows // count))]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "kind": "index", "name": "many", "shards": shards}))
    del shards
    start = time.process_time()
    plan = PlanConfig(stride=8, max_tokens=1024, tokens_per_pack=4096)
    planner = Planner([Corpus.open(folder)], plan=plan, seed=0, width=384, diffusion_share=0.5, consistency_share=0.1)
    step = planner.next_step()
    seconds = time.process_time() - start
    assert step.images
    return {"seconds_to_first_step": seconds, "peak_memory_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
