"""Write feature shards in the format of `pipeline.features.manifest`. The caller decides where files go and when they are committed."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline.features.manifest import EMPTY, FORMAT, KIND, TABLE
from pipeline.features.tensors import EXTENSION, pack
from pipeline.size_rule import Crop, SizeRule

_LONGEST_NAME = 80  # bytes; a longer key is replaced by its digest in the tar, but not in the table


class FeatureWriter:
    """Writes the tar and the table of one shard. Samples may come in any order."""

    def __init__(self, stream: BinaryIO, *, zstd: bool = False) -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._zstd = zstd
        self._rows: dict[str, tuple[Any, ...]] = {}

    def add(self, key: str, tensors: Mapping[str, Tensor], *, crops: Sequence[Crop], captions: int) -> None:
        """Add a sample encoded at the sizes `crops`, with `captions` captions. Tensors are on the CPU, in the dtype to store."""
        payload = pack(tensors, zstd=self._zstd)
        name = key if len(key.encode()) <= _LONGEST_NAME else hashlib.sha256(key.encode()).hexdigest()
        info = tarfile.TarInfo(f"{name}.{EXTENSION}{'.zst' if self._zstd else ''}")
        info.size = len(payload)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(payload))
        self._rows[key] = (key, offset, len(payload), *_columns(crops), captions, "")

    def leave_out(self, key: str, *, reason: str, crops: Sequence[Crop], captions: int) -> None:
        """Record a sample that cannot be encoded."""
        self._rows[key] = (key, 0, 0, *_columns(crops), captions, reason)

    def finish(self, keys: Sequence[str]) -> bytes:
        """Finish the tar. Returns the bytes of the table, with a row for each of `keys`, in this order."""
        self._tar.close()
        columns = [*zip(*(self._rows[key] for key in keys), strict=True)] or [()] * len(TABLE)
        table = pa.table([pa.array(values, type=field.type) for values, field in zip(columns, TABLE, strict=True)], schema=TABLE)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=max(1, len(keys)))
        return buffer.getvalue()


def features_manifest(
    *,
    codec: Mapping[str, Any] | None,
    text: Mapping[str, Any] | None,
    teacher: Mapping[str, Any] | None,
    dtype: str,
    zstd: bool,
    flipped: bool,
    rules: Sequence[SizeRule],
) -> dict[str, Any]:
    """The manifest of a folder, except `shards`, `totals` and `rejected`."""
    return {
        "format": FORMAT,
        "kind": KIND,
        "codec": codec,
        "text": text,
        "teacher": teacher,
        "dtype": dtype,
        "zstd": zstd,
        "flipped": flipped,
        "sizes": [asdict(rule) for rule in rules],
        "empty": EMPTY if text is not None else None,
    }


def _columns(crops: Sequence[Crop]) -> tuple[Sequence[int], ...]:
    """Heights, widths, resize heights and resize widths."""
    resize_heights, resize_widths, heights, widths = zip(*crops, strict=True) if crops else ((), (), (), ())
    return heights, widths, resize_heights, resize_widths
