"""Captions that are not UTF-8: decoded by their mark or the stated encoding, else rejected with the byte's position."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep.index_tars import index
from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.rejections import NothingKept
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.open import SourceConfig, open_sources
from dataprep.sources.raw_sample import RawSample
from pipeline.loading.pack_reader import decode_caption
from pipeline.planned_steps import Member, PlannedSample
from tests.dataprep.helpers import photo, table_rows, write_folder, write_tar

CAPTION = "café"


def sidecar(root: Path, text: bytes) -> Path:
    return write_folder(root / "set", {"a.jpg": photo(1), "a.txt": text})


def json_sidecar(root: Path, text: bytes) -> Path:
    return write_folder(root / "set", {"a.jpg": photo(1), "a.json": b'{"caption": "' + text + b'"}'})


def metadata(root: Path, text: bytes) -> Path:
    return write_folder(root / "set", {"a.jpg": photo(1), "metadata.csv": b"file_name,text\na.jpg," + text})


def table(root: Path, text: bytes) -> Path:
    return write_folder(root / "set", {"a.jpg": photo(1), "l.csv": b"file,caption\na.jpg," + text}) / "l.csv"


def tar(root: Path, text: bytes) -> Path:
    root.mkdir(exist_ok=True)
    return write_tar(root / "x.tar", [("a.jpg", photo(1)), ("a.txt", text)])


def binary_column(root: Path, text: bytes) -> Path:
    write_folder(root, {"a.jpg": photo(1)})
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": pa.array([text], pa.binary())}), root / "l.parquet")
    return root / "l.parquet"


def packed(root: Path, text: bytes) -> Path:
    image = photo(1)
    sample = len(image).to_bytes(4, "little") + len(text).to_bytes(4, "little") + image + text
    head = (1).to_bytes(4, "little") + (12).to_bytes(4, "little") + (12 + len(sample)).to_bytes(4, "little")
    shard = {
        "format": "mds",
        "raw_data": {"basename": "s.mds"},
        "zip_data": None,
        "compression": None,
        "samples": 1,
        "column_names": ["image", "caption"],
        "column_encodings": ["jpeg", "str"],
        "column_sizes": [None, None],
    }
    return write_folder(root / "p", {"s.mds": head + sample, "index.json": json.dumps({"version": 2, "shards": [shard]}).encode()})


KINDS = [sidecar, json_sidecar, metadata, table, tar, binary_column, packed]


def only(spec: Path, encoding: str | None = None) -> RawSample:
    [source] = open_sources([str(spec)], columns=ColumnConfig(encoding=encoding, image="image" if "parquet" in spec.name else None))
    assert encoding is None or source.layout in ("MDS", "webdataset") or encoding in source.reads()
    [sample] = source.samples()
    return sample


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_decodes_alike(tmp_path: Path, kind: Callable[[Path, bytes], Path]) -> None:
    assert only(kind(tmp_path / "utf8", CAPTION.encode())).captions == (CAPTION,)
    spec = kind(tmp_path / "stated", CAPTION.encode("cp1252"))
    assert only(spec, "cp1252").captions == (CAPTION,)
    refused = only(spec)
    assert refused.reason == "bad-record"
    assert "UTF-8 at byte" in refused.detail
    assert "0xe9" in refused.detail
    assert "columns.encoding" in refused.detail


@pytest.mark.parametrize("kind", [sidecar, tar, binary_column, packed])
@pytest.mark.parametrize("codec", ["utf-16", "utf-8-sig", "utf-32"])
def test_byte_order_marks_are_honoured(tmp_path: Path, kind: Callable[[Path, bytes], Path], codec: str) -> None:
    assert only(kind(tmp_path, CAPTION.encode(codec))).captions == (CAPTION,)


def test_an_index_treats_texts_as_preparing_does(tmp_path: Path) -> None:
    members = [("a.jpg", photo(1)), ("a.txt", b"caf\xe9"), ("b.jpg", photo(2)), ("b.txt", "über".encode("utf-16")), ("c.jpg", photo(3))]
    path = write_tar(tmp_path / "x.tar", [*members, ("c.json", b'{"caption": "\xff"}')])
    prepare([str(path)], out=tmp_path / "P", config=PrepareConfig())
    index([str(path)], out=tmp_path / "I")
    prepared, indexed = ({row["path"][-5:]: row for row in table_rows(tmp_path / name)} for name in ("P", "I"))
    for name, reason in (("a.jpg", "bad-record"), ("b.jpg", ""), ("c.jpg", "bad-record")):
        assert prepared[name]["reason"] == indexed[name]["reason"] == reason
        assert prepared[name]["captions"] == indexed[name]["captions"]
        assert prepared[name]["detail"] == indexed[name]["detail"] or not reason


def test_training_does_not_read_a_caption_that_cannot_be_decoded() -> None:
    nowhere = Member(0, 0)
    values: dict[str, Any] = {**dict.fromkeys(PlannedSample.__dataclass_fields__, 0), "text": nowhere, "json": nowhere}
    sample = PlannedSample(**values)
    assert decode_caption(sample, memoryview(CAPTION.encode("utf-16")), memoryview(b"")) == CAPTION
    with pytest.raises(ValueError, match=r"^not UTF-8 at byte 3 \(0xe9\)"):
        decode_caption(sample, memoryview(b"caf\xe9"), memoryview(b""))


def test_the_encoding_of_one_source(tmp_path: Path) -> None:
    spec = table(tmp_path, CAPTION.encode("cp1252"))
    named = {"old": SourceConfig(path=str(spec), columns=ColumnConfig(encoding="cp1252"))}
    prepare([], out=tmp_path / "C", config=PrepareConfig(sources=named))
    assert table_rows(tmp_path / "C")[0]["captions"] == [CAPTION]
    with pytest.raises(NothingKept, match="bad-record 1"):
        prepare([str(spec)], out=tmp_path / "D", config=PrepareConfig())
    with pytest.raises(ValueError, match="'utf8000' is not an encoding"):
        ColumnConfig(encoding="utf8000")
