"""Small corpora made on the spot, and ways to look into what was prepared."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from dataprep.prepare import PrepareConfig
from tests import REPOSITORY

PREPARE = """
import json, sys
from dataprep.prepare import PrepareConfig, prepare
told = json.load(sys.stdin)
prepare(told.pop("sources"), config=PrepareConfig.model_validate(told.pop("config")), **told)
"""


def start_prepare(sources: Sequence[Path | str], *, config: PrepareConfig, **told: Any) -> subprocess.Popen[str]:
    """`prepare` in a process of its own, which can be killed. `told`: its further arguments."""
    process = subprocess.Popen([sys.executable, "-c", PREPARE], cwd=REPOSITORY, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    with process.stdin:
        json.dump({"sources": sources, "config": config.model_dump(mode="json"), **told}, process.stdin, default=str)
    return process


def photo(seed: int, *, height: int = 40, width: int = 48, format: str = "JPEG", **options: Any) -> bytes:
    """A smooth image that is like no other seed's, to the eye and to a perceptual hash."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format, **options)
    return buffer.getvalue()


def write_folder(folder: Path, files: Mapping[str, bytes], *, rows: Iterable[Mapping[str, Any]] | None = None) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if rows is not None:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def photo_folder(folder: Path, *, count: int, first: int = 0) -> Path:
    names = [f"{number:05d}.jpg" for number in range(first, first + count)]
    files = {name: photo(first + place) for place, name in enumerate(names)}
    return write_folder(folder, files, rows=[{"file_name": name, "text": f"image {name}"} for name in names])


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def table_rows(corpus: Path) -> list[dict[str, Any]]:
    """All rows of all shards' own tables, rejected ones included."""
    return [row for path in sorted(corpus.glob("0?????.parquet")) for row in pq.read_table(path).to_pylist()]


def row_of(corpus: Path, path: str) -> dict[str, Any]:
    [row] = [row for row in table_rows(corpus) if row["path"] == path]
    return row


def member(corpus: Path, row: Mapping[str, Any], what: str) -> bytes:
    """The bytes of a sample's `image`, `text`, `cls` or `json`, by the table's offsets."""
    with open(corpus / f"{row['key'][:6]}.tar", "rb") as tar:
        tar.seek(row[f"{what}_offset"])
        return tar.read(row[f"{what}_length"])


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }
