"""Image folders: metadata tables of every kind, files beside the pictures, folder names as classes, and folders behind URLs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep.columns import ColumnConfig
from dataprep.prepare import PrepareConfig, prepare
from dataprep.records import RawSample
from dataprep.sources import Source, open_sources
from tests.dataprep.helpers import member, photo, photo_folder, row_of, table_rows, write_folder, write_tar


def source_of(spec: Path | str, **columns: Any) -> Source:
    [source] = open_sources([str(spec)], columns=ColumnConfig(**columns))
    return source


def samples_of(spec: Path | str, **columns: Any) -> list[RawSample]:
    return list(source_of(spec, **columns).samples())


def test_metadata_in_parquet(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": b"1", "deep/b.jpg": b"2", "c.jpg": b"3"})
    rows = [{"file_name": "a.jpg", "text": "one", "score": 0.5}, {"file_name": "deep/b.jpg", "text": "two", "score": 1.5}]
    rows.append({"file_name": "../f/c.jpg", "text": "climbs", "score": 0.0})
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    source = source_of(folder)
    assert source.reads() == "f: metadata.parquet, images from file_name, captions from text"
    samples = list(source.samples())
    assert [(sample.path, sample.captions, sample.reason) for sample in samples[:2]] == [
        ("a.jpg", ("one",), ""),
        ("deep/b.jpg", ("two",), ""),
    ]
    assert samples[2].reason == "bad-record"
    assert samples[1].extra == {"score": 1.5}
    assert source.notes() == ["f: 1 image(s) not listed by its metadata were left out"]
    digest = source.digest()
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "metadata.parquet")
    assert source_of(folder).digest() != digest


def test_columns_of_metadata_can_be_said(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "text": "short", "synthetic": "long and new"}]
    folder = write_folder(tmp_path / "f", {"a.jpg": b"1"}, rows=rows)
    [sample] = samples_of(folder, caption=("synthetic", "text"))
    assert (sample.path, sample.captions, sample.extra) == ("a.jpg", ("long and new", "short"), {})
    [sample] = samples_of(folder, caption="synthetic")
    assert (sample.captions, sample.extra) == (("long and new",), {"text": "short"})


def test_files_beside_the_pictures(tmp_path: Path) -> None:
    record = {"caption": "from json", "captions": ["another"], "label": 4, "score": 2}
    files = {
        "a.jpg": b"1",
        "a.txt": b"from txt",
        "a.caption": b"from caption",
        "a.json": json.dumps(record).encode(),
        "b.jpg": b"2",
        "b.caption": b"only this",
        "c.jpg": b"3",
        "c.json": b"[1]",
        "d.jpg": b"4",
        "stray.caption": b"?",
    }
    source = source_of(write_folder(tmp_path / "f", files))
    assert source.reads() == "f: captions from .txt, .caption, .json beside the images"
    assert source.expected() == 4
    a, b, c, d = source.samples()
    assert (a.captions, a.label, a.extra) == (("from txt", "from caption", "from json", "another"), 4, {"score": 2})
    assert (b.captions, d.captions) == (("only this",), ())
    assert (c.reason, c.detail) == ("bad-record", "the .json beside it is not a JSON object")
    assert source.notes() == ["f: 1 text file(s) without an image of the same name were left out"]


def test_folder_names_are_classes_where_nothing_else_is_said(tmp_path: Path) -> None:
    files = {"train/tench/1.jpg": b"1", "train/cat/2.jpg": b"2", "val/cat/3.jpg": b"3"}
    source = source_of(write_folder(tmp_path / "f", files))
    assert source.reads() == "f: the names of 2 folders as classes (cat is 0, tench is 1)"
    assert [(sample.path, sample.label, sample.extra) for sample in source.samples()] == [
        ("train/cat/2.jpg", 0, {"class_name": "cat"}),
        ("train/tench/1.jpg", 1, {"class_name": "tench"}),
        ("val/cat/3.jpg", 0, {"class_name": "cat"}),
    ]
    assert [sample.label for sample in samples_of(tmp_path / "f", folders=False)] == [None] * 3


@pytest.mark.parametrize("more", [{"top.jpg": b"0"}, {"train/cat/2.txt": b"a caption"}, {"train/metadata.csv": b"file_name,text\n"}])
def test_folder_names_are_no_classes_where_something_is(tmp_path: Path, more: dict[str, bytes]) -> None:
    folder = write_folder(tmp_path / "f", {"train/tench/1.jpg": b"1", "train/cat/2.jpg": b"2", **more})
    assert {sample.label for sample in samples_of(folder)} <= {None}
    asked = {sample.path: sample.label for sample in samples_of(folder, folders=True)}
    assert asked.get("train/tench/1.jpg", 1) == 1


def test_classes_go_the_whole_way(tmp_path: Path) -> None:
    files = {f"{name}/{number}.jpg": photo(number) for number, name in enumerate(("b", "a", "b"))}
    account = prepare([str(write_folder(tmp_path / "f", files))], out=tmp_path / "C", config=PrepareConfig())
    assert account.kept == 3
    row = row_of(tmp_path / "C", "b/0.jpg")
    assert (member(tmp_path / "C", row, "cls"), row["class_name"]) == (b"1", "b")


def test_a_folder_is_what_lies_in_it(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "shards/00000.tar", []) if (tmp_path / "shards").mkdir() is None else None
    assert tar
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": ["0"]}), buffer)
    write_folder(tmp_path, {"shards/00000.parquet": buffer.getvalue(), "lists/b.csv": b"path\nx.jpg\n", "lists/a.csv": b"path\ny.jpg\n"})
    assert source_of(tmp_path / "shards").layout == "webdataset"
    assert [sample.path for sample in samples_of(tmp_path / "lists")] == ["y.jpg", "x.jpg"]
    with pytest.raises(ValueError, match="inside the source"):
        prepare([str(tmp_path / "lists")], out=tmp_path / "lists/C", config=PrepareConfig())


# ---- behind a URL


def test_every_layout_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    files = fsspec.filesystem("s3")
    photo_folder(tmp_path / "listed", count=3)
    write_folder(
        tmp_path / "beside", {"deep/a.jpg": photo(10), "deep/a.txt": b"a", "b.png": photo(11, format="PNG"), "b.json": b'{"text": "b"}'}
    )
    write_folder(tmp_path / "lists", {"list.csv": b"path,text\nimages/c.jpg,c\n../beside/b.png,climbs\n", "images/c.jpg": photo(12)})
    (tmp_path / "shards").mkdir()
    for number in range(2):
        members = [(f"{number}{name}", data) for name, data in ((".jpg", photo(20 + number)), (".txt", b"in a tar"))]
        write_tar(tmp_path / f"shards/{number:05d}.tar", members)
    for name in ("listed", "beside", "lists", "shards"):
        files.put(str(tmp_path / name), f"{bucket}/{name}", recursive=True)
    sources = [
        f"{bucket}/listed",
        f"{bucket}/beside",
        f"{bucket}/lists/list.csv",
        f"{bucket}/shards/{{00000..00001}}.tar",
        f"more={bucket}/shards",
    ]
    account = prepare(sources, out=tmp_path / "C", config=PrepareConfig(), workers=2)
    assert (account.kept, account.rejected) == (3 + 2 + 1 + 2, {"bad-record": 1, "duplicate": 2})
    rows = table_rows(tmp_path / "C")
    assert {row["source"] for row in rows} == {"listed", "beside", "list", "shards", "more"}
    found = {row["path"]: row for row in rows if row["key"]}
    assert member(tmp_path / "C", found["00000.tar/0.jpg"], "image") == photo(20)
    assert member(tmp_path / "C", found["images/c.jpg"], "image") == photo(12)
    assert (found["deep/a.jpg"]["caption"], found["b.png"]["caption"]) == ("a", "b")
    digest = source_of(f"{bucket}/shards/00000.tar").digest()
    files.pipe(f"{bucket}/shards/00000.tar", (tmp_path / "shards/00001.tar").read_bytes())  # of the same size
    files.invalidate_cache()
    assert source_of(f"{bucket}/shards/00000.tar").digest() != digest
