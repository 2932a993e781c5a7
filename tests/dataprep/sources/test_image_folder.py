"""Image folders: metadata tables of every kind, files beside the images, folder names as classes, and folders behind URLs."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep.prepare import PrepareConfig, prepare
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.open import InputSource, open_sources
from dataprep.sources.raw_sample import RawSample
from tests.dataprep.helpers import member, photo, photo_folder, row_of, table_rows, write_folder, write_tar


def source_of(spec: Path | str, **columns: Any) -> InputSource:
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


def test_files_beside_the_images(tmp_path: Path) -> None:
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
    assert (c.reason, c.detail) == ("bad-record", "the .json beside it is not a JSON object but an array")
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
    counts = prepare([str(write_folder(tmp_path / "f", files))], out=tmp_path / "C", config=PrepareConfig())
    assert counts.kept == 3
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


def test_texts_of_any_case_and_of_whole_names(tmp_path: Path) -> None:
    files = {
        "IMG_0.JPG": b"0", "IMG_0.TXT": b"upper",
        "IMG_1.jpg": b"1", "IMG_1.Caption": b"mixed",
        "a.jpg": b"2", "a.jpg.txt": b"of a.jpg", "a.jpg.json": b'{"caption": "gallery-dl"}',
        "a.png": b"3", "a.txt": b"of both", "a.png.TXT": b"of a.png",
        "Photo.jpg": b"4", "photo.txt": b"other case",
        "b.jpg": b"5", "B.jpg": b"6", "b.txt": b"of b alone",
        "c.jpg": b"7", "c.json": b"[1]", "c.txt": b"not hidden by an array",
        "stray.TXT": b"?",
    }  # fmt: skip
    folder = write_folder(tmp_path / "f", files)
    source = source_of(folder)
    assert {sample.path: sample.captions for sample in source.samples()} == {
        "IMG_0.JPG": ("upper",), "IMG_1.jpg": ("mixed",), "a.jpg": ("of both", "of a.jpg", "gallery-dl"), "a.png": ("of both", "of a.png"),
        "Photo.jpg": ("other case",), "b.jpg": ("of b alone",), "B.jpg": (), "c.jpg": ("not hidden by an array",),
    }  # fmt: skip
    assert source.notes() == [
        "f: 1 .json file(s) beside images and their texts are not JSON objects and were not used",
        "f: 1 text file(s) without an image of the same name were left out",
    ]
    files_there = fsspec.filesystem("memory")
    files_there.put(str(folder), "/cased", recursive=True)
    remote = source_of("memory://cased")
    assert list(map(_said, remote.samples())) == list(map(_said, source.samples()))
    assert [note.partition(": ")[2] for note in remote.notes()] == [note.partition(": ")[2] for note in source.notes()]
    files_there.rm("/cased", recursive=True)


def _said(sample: RawSample) -> tuple[object, ...]:
    return sample.path, sample.captions, sample.label, sample.reason


def test_what_is_not_read_is_counted_by_extension(tmp_path: Path) -> None:
    files = {"0.jpg": b"0", "0.txt": b"t", **{f"{n}.svg": b"" for n in range(3)}, "a.psd": b"", "b.PSD": b"", "Makefile": b""}
    files |= {"images.zip": b"", "more.7z": b"", "list.csv": b"image,caption\n", "captions.txt": b"image,caption\n0.jpg,a\n", "t.tar": b""}
    source = source_of(write_folder(tmp_path / "f", files))
    assert len(list(source.samples())) == 1
    assert source.notes() == [
        "f: not read: 3 .svg, 2 .psd, 1 without extension",
        "f: not read: images.zip, more.7z; unpack archives to use what is in them",
        "f: tables and JSON files that were not used: list.csv, captions.txt; give a table as a source of its own "
        f"(tim prepare {tmp_path}/f/list.csv), or name it metadata.csv or metadata.jsonl",
        "f: 1 tar file(s) inside the folder are no part of it: name them as sources of their own",
    ]
    write_folder(tmp_path / "f", {f"x.{n:02}": b"" for n in range(14)} | {f"{n}.zip": b"" for n in range(14)})
    notes = source_of(tmp_path / "f").notes()
    assert notes[0].endswith("and 7 of 7 other kind(s)")
    assert "and 6 more; unpack" in notes[1]
    with pytest.raises(ValueError, match=r"no images, no shards and no lists in this folder; not read: 1 \.svg"):
        open_sources([str(write_folder(tmp_path / "none", {"a.svg": b""}))])


@pytest.mark.parametrize("kind", ["images", "tars", "lists"])
def test_linked_folders_are_followed_once(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "f"

    def put(folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "images":
            write_folder(folder, {f"{name}.jpg": b"1", f"{name}.txt": b"t"})
        elif kind == "tars":
            write_tar(folder / f"{name}.tar", [(f"{name}.jpg", b"1"), (f"{name}.txt", b"t")])
        else:
            write_folder(folder, {f"{name}.csv": f"path,text\n{name}.jpg,t\n".encode()})

    put(root / "own", "0")
    put(tmp_path / "elsewhere/x", "1")
    put(tmp_path / "elsewhere/x/deep", "2")
    links = {
        "linked": "../elsewhere/x", "a_again": "own", "twice": "../elsewhere/x/deep", "up": "..", "self": ".", "own/loop": "loop",
        "gone": "nowhere",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "elsewhere/x/back").symlink_to(root)
    source = source_of(root)
    assert sorted(Path(sample.path).stem for sample in source.samples()) == ["0", "1", "2"]
    assert source.notes() == [
        "f: 1 link(s) to folders were followed",
        "f: 4 link(s) to folders that are part of the source already were not followed",
        "f: 1 link(s) to folders above the source were not followed",
        "f: 2 broken link(s) were left out",
    ]


def test_file_names_of_metadata_that_are_spelt_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    files = {"deep/a.jpg": b"1", "B.JPG": b"2", "c.jpg": b"3", "caf\u00e9.jpg": b"4", "x.jpg": b"5", "X.jpg": b"6", "only.png": b"7"}
    names = ["deep\\a.jpg", "b.jpg", f"{folder}/c.jpg", "cafe\u0301.jpg", "x.JPG", "only", "C:\\data\\c.jpg", "..\\c.jpg", "/c.jpg"]
    source = source_of(write_folder(folder, files, rows=[{"file_name": name, "text": "t"} for name in names]))
    samples = list(source.samples())
    assert [sample.path for sample in samples[:4]] == ["deep/a.jpg", "B.JPG", "c.jpg", "caf\u00e9.jpg"]
    assert [sample.reason for sample in samples] == ["", "", "", "", "missing", "missing", "bad-record", "bad-record", "bad-record"]
    assert "X.jpg, x.jpg differ from it in case only" in samples[4].detail
    assert "there is only.png" in samples[5].detail
    assert all("paths start from the folder of the metadata" in sample.detail for sample in samples[6:])
    assert source.notes() == [
        "f: 3 image(s) not listed by its metadata were left out",
        "f: 1 file name(s) of the metadata were taken by a path from the root",
        "f: 2 file name(s) of the metadata were taken in another case or Unicode form",
        "f: 1 file name(s) of the metadata were taken with backslashes",
    ]


def test_captions_from_file_names(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"deep/a_red-fox__2.JPG": b"1", "b.jpg": b"2", "b.txt": b"text"})
    assert [sample.captions for sample in samples_of(folder, caption="filename")] == [("b", "text"), ("a red fox 2",)]
    assert [sample.captions for sample in samples_of(folder, caption=("caption", "filename"))] == [("b", "text"), ("a red fox 2",)]
    listed = write_folder(tmp_path / "g", {"a_b.jpg": b"1"}, rows=[{"file_name": "a_b.jpg", "text": "t"}])
    assert [sample.captions for sample in samples_of(listed, caption=("text", "filename"))] == [("t", "a b")]
    table = write_folder(tmp_path / "h", {"list.csv": b"filename,label\nx/two_dogs.jpg,1\n"}) / "list.csv"
    [sample] = samples_of(table, caption="filename")
    assert (sample.path, sample.captions, sample.label) == ("x/two_dogs.jpg", ("two dogs",), 1)
    with pytest.raises(ValueError, match="has no column filename"):
        source_of(write_folder(tmp_path / "i", {"list.csv": b"path,text\nx,1\n"}) / "list.csv", label="filename")


def test_folders_of_users(shared: Path, tmp_path: Path) -> None:
    users = shared / "cases/users"
    if not users.exists():
        pytest.skip(f"{users} is not there")
    for name, count in (("upper", 3), ("dbl", 3), ("gdl", 3)):
        assert [bool(sample.captions) for sample in samples_of(users / "07-sidecar-names" / name)] == [True] * count
    (tmp_path / "images").mkdir()
    (tmp_path / "images/linked").symlink_to(users / "08-linked-folder/elsewhere/x")
    (tmp_path / "images/own").symlink_to(users / "08-linked-folder/pictures/own")
    assert len(samples_of(tmp_path / "images")) == 5
    unseen = users / "11-files-unseen"
    told = {}
    for name in ("jxl", "flick", "zipd"):
        source = source_of(unseen / name)
        samples = list(source.samples())
        told[name] = (len(samples), " ".join(source.notes()))
    assert "1 .svg" in told["jxl"][1]
    assert "4.zip" in told["jxl"][1]
    assert "captions.txt; give a table as a source of its own" in told["flick"][1]
    assert "images.zip; unpack" in told["zipd"][1]


def test_formats_of_users_are_inputs_or_counted(shared: Path, tmp_path: Path) -> None:
    tar = shared / "cases/users/ext.tar"
    if not tar.exists():
        pytest.skip(f"{tar} is not there")
    with tarfile.open(tar) as archive:
        archive.extractall(tmp_path / "f", filter="data")
    source = source_of(tmp_path / "f")
    inputs = len(list(source.samples()))
    [note] = [note for note in source.notes() if "not read: " in note]
    counted = [int(number) for number in re.findall(r"(\d+) (?:\.|of )", note)]
    assert inputs + sum(counted) == 15


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
    counts = prepare(sources, out=tmp_path / "C", config=PrepareConfig(), workers=2)
    assert (counts.kept, counts.rejected) == (3 + 2 + 1 + 2, {"bad-record": 1, "duplicate": 2})
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
