"""What each layout gives: inputs in a fixed order, and for everything odd a reason or a note."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.files.paths import expand_braces
from dataprep.sources.open import open_sources
from dataprep.sources.raw_sample import RawSample
from tests.dataprep.helpers import photo, write_folder, write_tar


def read(spec: Path | str) -> tuple[list[RawSample], list[str]]:
    [source] = open_sources([str(spec)])
    samples = list(source.samples())
    assert samples == list(source.samples())
    return samples, source.notes()


def test_metadata_rows_in_their_order(tmp_path: Path) -> None:
    files = {"b.jpg": b"b", "deep/a.PNG": b"a", "unlisted.jpg": b"u", "notes.pdf": b"p", "x.tar": b"t", ".hidden.jpg": b"h"}
    rows = [
        {"file_name": "deep/a.PNG", "text": "one", "captions": ["one", "two"], "label": 3, "width": 1, "score": 0.5, "source": "web"},
        {"file_name": "b.jpg", "caption": "three", "class": "7"},
        {"file_name": "gone.jpg", "text": "four"},
        {"text": "no name"},
        {"file_name": "../b.jpg", "text": "climbs"},
        {"file_name": "/etc/passwd", "text": "absolute"},
    ]
    folder = write_folder(tmp_path / "pictures", files, rows=rows)
    with open(folder / "metadata.jsonl", "a") as stream:
        stream.write('\n[1, 2]\n{"file_name": "b.jpg", "te')
    samples, notes = read(folder)
    assert [sample.path for sample in samples] == [
        "deep/a.PNG",
        "b.jpg",
        "gone.jpg",
        "metadata.jsonl:4",
        "metadata.jsonl:5",
        "metadata.jsonl:6",
        "metadata.jsonl:8",
        "metadata.jsonl:9",
    ]
    assert [sample.reason for sample in samples] == ["", "", "missing"] + ["bad-record"] * 5
    assert samples[0].captions == ("one", "one", "two")
    assert (samples[0].label, samples[1].label) == (3, 7)
    assert samples[0].extra == {"score": 0.5, "source_source": "web"}
    assert {sample.source for sample in samples} == {"pictures"}
    assert any(note.startswith("pictures: 1 image(s) not listed") for note in notes)
    assert any(note.startswith("pictures: 1 tar file(s)") for note in notes)


def test_metadata_of_a_subfolder_speaks_for_it_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"top.jpg": b"1", "top.txt": b"beside it"})
    write_folder(tmp_path / "set/train", {"a.jpg": b"2", "b.jpg": b"3"}, rows=[{"file_name": "a.jpg", "text": "listed"}])
    samples, notes = read(tmp_path / "set")
    assert [(sample.path, sample.captions) for sample in samples] == [("train/a.jpg", ("listed",)), ("top.jpg", ("beside it",))]
    assert notes == ["set: 1 image(s) not listed by its metadata were left out"]


def test_sidecars(tmp_path: Path) -> None:
    files = {"a.jpg": b"1", "a.txt": "\ufeffein Café".encode(), "sub/b.webp": b"2", "sub/b.txt": b"b", "c.png": b"3", "README.txt": b"?"}
    samples, notes = read(write_folder(tmp_path / "s", files))
    assert [(sample.path, sample.captions) for sample in samples] == [("a.jpg", ("ein Café",)), ("c.png", ()), ("sub/b.webp", ("b",))]
    assert notes == ["s: 1 text file(s) without an image of the same name were left out"]


def test_csv(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "s", {"a.jpg": b"1", "b.jpg": b"2"})
    table = '\ufefffile_name,text,label\na.jpg,"one, ""two""\nthree",4\nb.jpg,only two columns\nb.jpg,fine,5\nb.jpg,"never closed,6\n'
    (folder / "metadata.csv").write_text(table, "utf-8")
    samples, _ = read(folder)
    assert [(sample.path, sample.reason, sample.label) for sample in samples] == [
        ("a.jpg", "", 4),
        ("metadata.csv:4", "bad-record", None),
        ("b.jpg", "", 5),
        ("metadata.csv:6", "bad-record", None),
    ]
    assert samples[0].captions == ('one, "two"\nthree',)


def test_a_tar_in_img2datasets_layout(tmp_path: Path) -> None:
    record = {
        "url": "http://x/1",
        "caption": "one",
        "key": "1",
        "width": 9,
        "error_message": None,
        "exif": "{}",
        "captions": ["one", "zwei"],
    }
    members = [
        ("000.jpg", b"picture"),
        ("000.txt", b"one"),
        ("000.json", json.dumps(record).encode()),
        ("001.seg.png", b"ignored"),
        ("001.PNG", b"other"),
        ("001.cls", b"12\n"),
        ("002.jpg", b"bad json"),
        ("002.json", b"{"),
        ("./sub/003.jpeg", b"in a folder"),
        ("./sub/003.txt", b"three"),
    ]
    path = write_tar(tmp_path / "00000.tar", members)
    samples, notes = read(path)
    assert [(sample.path, sample.reason) for sample in samples] == [
        ("00000.tar/000.jpg", ""),
        ("00000.tar/001.PNG", ""),
        ("00000.tar/002.jpg", "bad-record"),
        ("00000.tar/./sub/003.jpeg", ""),
    ]
    assert samples[0].captions == ("one", "one", "one", "zwei")
    assert samples[0].extra == {"url": "http://x/1", "exif": "{}"}
    assert samples[1].label == 12
    data = path.read_bytes()
    assert [data[sample.offset : sample.offset + (sample.length or 0)] for sample in samples[:2]] == [b"picture", b"other"]
    [note] = notes
    assert note.startswith("00000: members left out, by extension: 1 .seg.png (webdataset's key ends at the first dot")


def test_links_and_climbing_names_are_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.CHRTYPE), ("d", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../e.jpg", "/f.jpg", "x/../../g.jpg", "fine.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    samples, _ = read(path)
    assert [sample.reason for sample in samples] == ["bad-record"] * 6 + [""]


@pytest.mark.parametrize("cut", ["data", "padding", "header", "stub of a header", "damaged header"])
def test_where_a_tar_ends_too_early_something_says_so(tmp_path: Path, cut: str) -> None:
    members = [(f"{number}.{extension}", bytes(700)) for number in range(3) for extension in ("jpg", "txt")]
    path = write_tar(tmp_path / "t.tar", members)
    data = bytearray(path.read_bytes())
    last = 5 * (512 + 1024)  # header of 2.txt
    assert data[last : last + 5] == b"2.txt"
    if cut == "damaged header":
        data[last + 200] ^= 0xFF
    keep = {"data": last + 600, "padding": last + 1300, "header": last + 300, "stub of a header": last + 50}.get(cut, len(data))
    path.write_bytes(data[:keep])
    samples, _ = read(path)
    found = [(sample.path, sample.reason) for sample in samples]
    whole = [("t.tar/0.jpg", ""), ("t.tar/1.jpg", "")]
    if cut == "damaged header":
        assert found == [*whole, ("t.tar/2.jpg", ""), ("t.tar", "bad-record")]
    elif cut == "stub of a header":
        assert found == [*whole, ("t.tar/2.jpg", ""), ("t.tar", "damaged")]
    else:
        assert found == [*whole, ("t.tar/2.jpg", "damaged")]


def test_a_tar_without_its_closing_blocks_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.jpg", bytes(700)), ("a.txt", b"text")])
    path.write_bytes(path.read_bytes()[: 512 + 1024 + 512 + 512])
    samples, notes = read(path)
    assert [(sample.path, sample.reason) for sample in samples] == [("t.tar/a.jpg", "")]
    assert notes == []


def test_braces() -> None:
    assert expand_braces("a/{008..010}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar"]
    assert expand_braces("{8..10}{x,y}") == ["8x", "8y", "9x", "9y", "10x", "10y"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(ValueError, match="range"):
        expand_braces("{5..1}")


def test_names_of_sources_are_unique(tmp_path: Path) -> None:
    for folder in ("a/set", "b/set"):
        write_folder(tmp_path / folder, {"1.jpg": b""})
    write_folder(tmp_path / "shards", {f"0000{number}.tar": b"" for number in range(2)})
    specs = [tmp_path / "a/set", tmp_path / "b/set", tmp_path / "shards/{00000..00001}.tar", tmp_path / "shards/00001.tar"]
    assert [source.name for source in open_sources([str(spec) for spec in specs])] == ["set", "set-2", "shards", "00001"]


def test_the_digest_follows_names_sizes_and_metadata(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "s", {"a.jpg": photo(1)}, rows=[{"file_name": "a.jpg", "text": "one"}])
    digest = open_sources([str(folder)])[0].digest()
    assert open_sources([str(folder)])[0].digest() == digest
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "two"}\n')
    changed = open_sources([str(folder)])[0].digest()
    assert changed != digest
    (folder / "b.jpg").write_bytes(b"new")
    assert open_sources([str(folder)])[0].digest() != changed


@pytest.mark.parametrize("spec", ["nowhere", "empty", "only_notes", "file.zip", "none/*.tar", "s/{0..3}.tar"])
def test_what_is_no_source_is_a_one_line_error(tmp_path: Path, spec: str) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path, {"only_notes/1.txt": b"", "file.zip": b"zip", "s/0.tar": b""})
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        open_sources([str(tmp_path / spec)])
    with pytest.raises(ValueError, match="no source"):
        open_sources([])


def test_img2datasets_table_speaks_for_what_the_tar_leaves_unsaid(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("0.jpg", b"a"), ("1.jpg", b"b"), ("1.json", b'{"caption": "from json"}'), ("2.jpg", b"c")])
    rows = [
        {"key": "0", "caption": "from the table", "similarity": 0.5, "status": "success", "url": "http://x/0"},
        {"key": "1", "caption": "from the table", "similarity": 0.25, "status": "success", "url": "http://x/1"},
        {"key": "9", "caption": "never came", "similarity": 0.1, "status": "failed_to_download", "url": "http://x/9"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    samples, notes = read(tmp_path / "00000.tar")
    assert [sample.captions for sample in samples] == [("from the table",), ("from json",), ()]
    assert [sample.extra for sample in samples] == [
        {"similarity": 0.5, "url": "http://x/0"},
        {"similarity": 0.25, "url": "http://x/1"},
        {},
    ]
    assert notes == ["00000: 1 row(s) of img2dataset's tables have no image: their download had failed"]


def test_captions_of_shards_can_be_said(tmp_path: Path) -> None:
    record = json.dumps({"caption": "alt", "synthetic": "new", "more": ["x", "y"]}).encode()
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"a"), ("0.txt", b"text"), ("0.caption", b"beside"), ("0.json", record)])
    [guessed] = read(path)[0]
    assert guessed.captions == ("text", "beside", "alt")
    [source] = open_sources([str(path)], columns=ColumnConfig(caption=("synthetic", "more")))
    [said] = source.samples()
    assert said.captions == ("new", "x", "y", "text", "beside")
    assert said.extra == {"source_caption": "alt"}


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst"])
def test_compressed_tars(tmp_path: Path, ending: str) -> None:
    members = [(f"{number}{name}", data) for number in range(3) for name, data in ((".jpg", bytes([number]) * 700), (".txt", b"text"))]
    plain = write_tar(tmp_path / "plain.tar", members).read_bytes()
    compress = zstandard.compress if ending == "tar.zst" else gzip.compress
    (tmp_path / f"000.{ending}").write_bytes(compress(plain))
    samples, notes = read(tmp_path / f"000.{ending}")
    assert [(sample.source, sample.data, sample.captions) for sample in samples] == [
        ("000", bytes([number]) * 700, ("text",)) for number in range(3)
    ]
    assert notes == []
    if ending == "tar.zst":
        return
    noise = write_tar(tmp_path / "noise.tar", [(f"{number}.jpg", os.urandom(1000)) for number in range(9)]).read_bytes()
    (tmp_path / f"cut.{ending}").write_bytes(gzip.compress(noise)[:5000])
    found = read(tmp_path / f"cut.{ending}")[0]
    assert {sample.reason for sample in found[:3]} == {""}
    assert (found[-1].reason, found[-1].path) == ("bad-record", f"cut.{ending}")
    assert "breaks off" in found[-1].detail
