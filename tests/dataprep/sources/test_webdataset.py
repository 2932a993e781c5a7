"""`tim prepare` and `tim index` find the same samples in every tar, whatever the order and the names of its members."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataprep.index_tars import index, read_foreign
from dataprep.prepare import PrepareConfig, prepare
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.open import open_sources
from dataprep.sources.raw_sample import RawSample
from tests.dataprep.helpers import photo, write_tar
from tests.pipeline.corpus.test_foreign_tar import jpeg

STEMS = st.sampled_from(["0", "1", "./0", "./sub/0", "img_1.5x", "2023.01", "2023.02", "k.input", "k", ".hidden", "é" * 90, "d.d/0"])
EXTENSIONS = st.sampled_from(["jpg", "png", "PNG", "txt", "TXT", "caption", "json", "cls", "npy", "seg.png", "en.txt", ""])
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def small_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = small_image()


def content(extension: str, number: int) -> bytes:
    last = extension.lower().rpartition(".")[2]
    if last in ("jpg", "png"):
        return IMAGE
    return {"cls": b"%d" % number, "json": b'{"caption": "json %d"}' % number, "npy": b"\0"}.get(last, b"text %d" % number)


def write(path: Path, names: list[str], *, format: int) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            data = content(name.rpartition("/")[2].partition(".")[2], number)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def prepared(tar: Path) -> tuple[list[RawSample], list[str]]:
    [source] = open_sources([str(tar)])
    samples = list(source.samples())
    assert samples == list(source.samples())
    return samples, source.notes()


@given(st.lists(st.builds("{}.{}".format, STEMS, EXTENSIONS) | st.sampled_from(["./", "sub/"]), max_size=14), FORMATS)
@settings(max_examples=80, deadline=None)
def test_prepare_and_index_accept_the_same_samples(names: list[str], format: int) -> None:
    with TemporaryDirectory() as folder:
        tar = write(Path(folder) / "t.tar", names, format=format)
        samples, notes = prepared(tar)
        found = read_foreign(str(tar))[0]
    rows = found.table.to_pylist()
    assert [sample.path.removeprefix("t.tar/") for sample in samples] == [row["path"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert (row["image_offset"], row["image_length"]) == ((sample.offset, sample.length) if sample.length else (None, None))
        if row["reason"] != "no-caption":
            assert row["reason"] == sample.reason
        if sample.reason:
            continue
        texts = sum(name.lower().endswith((".txt", ".caption")) for name in names)
        assert row["captions"] == list(sample.captions) or (texts > 1 and row["captions"][:1] == list(sample.captions[:1]))
        assert row["label"] == sample.label
        assert (row["reason"] == "no-caption") == (not sample.captions and sample.label is None)
    keys = [row["key"] for row in rows if row["key"] is not None]
    assert len(set(keys)) == len(keys)
    assert bool(found.left_out) <= bool(notes)
    images = Counter(name for name in names if name.lower().endswith((".jpg", ".png")))
    inputs = sum(1 for row in rows if row["image_length"] or row["path"].lower().endswith((".jpg", ".png")))
    left_out = sum(count for name, count in found.left_out.items() if name == "hidden" or name.endswith((".jpg", ".png")))
    assert inputs <= images.total() <= inputs + left_out


@given(st.permutations([f"{number}.{extension}" for number in range(3) for extension in ("jpg", "txt", "json", "cls")]))
@settings(max_examples=30, deadline=None)
def test_the_order_of_members_changes_nothing_but_the_order_of_samples(names: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.tar"
        write_tar(path, [(name, content(name.partition(".")[2], int(name[0]))) for name in names])
        samples, notes = prepared(path)
    assert notes == []
    assert [sample.path[6] for sample in samples] == list(dict.fromkeys(name[0] for name in names))
    for sample in samples:
        number = sample.path[6]
        assert (sample.captions, sample.label) == ((f"text {number}", f"json {number}"), int(number))


def rows_of(*names: str, folder: Path) -> list[tuple[str | None, str, str]]:
    path = write(folder / "t.tar", list(names), format=tarfile.PAX_FORMAT)
    samples, _ = prepared(path)
    rows = read_foreign(str(path))[0].table.to_pylist()
    assert [row["path"] for row in rows] == [sample.path.removeprefix("t.tar/") for sample in samples]
    return [(row["key"], row["path"], row["reason"]) for row in rows]


def test_keys_that_come_twice_or_have_several_images(tmp_path: Path) -> None:
    assert rows_of("k.jpg", "k.txt", "x.jpg", "x.txt", "k.txt", "k.jpg", folder=tmp_path) == [
        ("k", "k.jpg", ""), ("k~2", "k.jpg", ""), ("x", "x.jpg", ""),
    ]  # fmt: skip
    # Which text belongs to which image cannot be told: neither is guessed.
    assert rows_of("k.jpg", "k.jpg", "k.txt", "k.txt", folder=tmp_path) == [(None, "k.jpg", "bad-record")] * 2
    assert rows_of("k.png", "k.txt", "k.jpg", folder=tmp_path) == [("k", "k.jpg", "")]
    assert rows_of("img.1.jpg", "img.2.jpg", "img.2.txt", "img.1.txt", folder=tmp_path) == [
        ("img_1", "img.1.jpg", ""), ("img_2", "img.2.jpg", ""),
    ]  # fmt: skip
    assert rows_of("a.left.jpg", "a.right.jpg", "a.txt", folder=tmp_path) == [
        (None, "a.left.jpg", "bad-record"), (None, "a.right.jpg", "bad-record"),
    ]  # fmt: skip


def test_a_broken_json_member_is_named_with_its_line_by_prepare_and_index_alike(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", jpeg()), ("a.json", b'{\n "caption": "x",\n}')])
    [sample], _ = prepared(tar)
    [row] = read_foreign(str(tar))[0].table.to_pylist()
    assert sample.detail == row["detail"]
    assert sample.detail.startswith("a.json is not JSON: ")
    assert "(line 3, column 1)" in sample.detail or "(line 2, column 16)" in sample.detail  # newer Pythons point at the comma


def test_notes_name_at_most_ten_extensions_and_tars(tmp_path: Path) -> None:
    names = [f"{number}.x{number:02}" for number in range(15)]
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", b"a"), ("a.txt", b"t"), *((name, b"") for name in names)])
    _, [note] = prepared(tar)
    assert note.endswith("1 .x08, 1 .x09 and 5 of 5 other kind(s)")
    for number in range(12):
        write_tar(tmp_path / f"empty{number:02}.tar", [])
    [source] = open_sources([str(tmp_path / "empty{00..11}.tar")])
    assert not list(source.samples())
    assert source.notes()[0].endswith("empty09.tar and 2 more hold no samples")


@pytest.mark.parametrize("where", ["gz", "url"])
def test_streams_are_joined_as_files_are(tmp_path: Path, where: str) -> None:
    names = ["1.txt", "0.txt", "0.jpg", "1.jpg"]
    tar = write(tmp_path / "t.tar", names, format=tarfile.PAX_FORMAT)
    expected = [(sample.path, sample.captions) for sample in prepared(tar)[0]]
    if where == "gz":
        spec = tmp_path / "t.tar.gz"
        spec.write_bytes(gzip.compress(tar.read_bytes()))
    else:
        files, spec = fsspec.filesystem("memory"), "memory://joined/t.tar"
        files.pipe("/joined/t.tar", tar.read_bytes())
    [source] = open_sources([str(spec)])
    found = list(source.samples())
    assert [(sample.path.replace(".gz", ""), sample.captions) for sample in found] == expected
    assert {sample.data for sample in found} == {IMAGE}


def test_captions_from_the_names_of_members(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("deep/a_red-fox.jpg", b"a"), ("b.jpg", b"b"), ("b.txt", b"text")])
    [source] = open_sources([str(tar)], columns=ColumnConfig(caption="filename"))
    assert [sample.captions for sample in source.samples()] == [("a red fox",), ("b", "text")]


@pytest.mark.parametrize("name", ["unsorted", "dotted", "dotkey"])
def test_tars_of_users(shared: Path, tmp_path: Path, name: str) -> None:
    tar = shared / f"cases/users/10-tars-out-of-order-or-dotted/{name}.tar"
    if not tar.exists():
        pytest.skip(f"{tar} is not there")
    counts = prepare([str(tar)], out=tmp_path / "C", config=PrepareConfig())
    indexed = index([str(tar)], out=tmp_path / "I")
    assert (counts.kept, counts.rejected) == (indexed.kept, indexed.rejected) == (6, {})
    assert any("several dots" in note for note in counts.notes) == any("several dots" in note for note in indexed.notes)
    assert any("several dots" in note for note in counts.notes) == (name != "unsorted")


def test_a_tar_of_a_folder(shared: Path, tmp_path: Path) -> None:
    tar = shared / "cases/users/t_gnu.tar"
    if not tar.exists():
        pytest.skip(f"{tar} is not there")
    samples, [note] = prepared(tar)
    rows = read_foreign(str(tar))[0].table.to_pylist()
    assert [sample.path.removeprefix("t_gnu.tar/") for sample in samples] == [row["path"] for row in rows]
    assert len(samples) == 16
    assert "2 hidden, 1 .npy, 1 .png, 1 .pyd" in note


def test_nothing_kept_is_explained(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.seg.npy", photo(1)), ("a.blip.txt", b"t")])
    with pytest.raises(RuntimeError, match=r"they are empty.*1 \.blip\.txt, 1 \.seg\.npy \(webdataset's key ends at the first dot"):
        index([str(tar)], out=tmp_path / "I")
