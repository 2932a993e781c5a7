"""Tars that others wrote give the tables that `tim prepare` would have written."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.writer import TarWriter

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.foreign_tar import ForeignShard, index_tar
from pipeline.loading.pack_reader import PackReader, decode_caption
from pipeline.planned_steps import NO_MEMBER, Member
from pipeline.storage.shard_reader import ShardReader
from pipeline.storage.tar import BlockReader
from tests.pipeline.storage.test_tar import FORMATS, write


def jpeg(height: int = 20, width: int = 30, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (height, width, 0)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def index(data: bytes, **options: Any) -> ForeignShard:
    return index_tar(BlockReader(lambda offset, length: data[offset : offset + length], size=len(data)), tar="t.tar", **options)


def rows(shard: ForeignShard) -> list[dict[str, Any]]:
    return shard.table.to_pylist()


def three_samples() -> dict[str, dict[str, bytes]]:
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "a": {"jpg": jpeg(20, 30, exif=turned), "txt": b"  the\xc2\xa0first \n"},
        "sub/b": {"jpg": jpeg(10, 40), "json": json.dumps({"caption": "second", "captions": ["second", "zwei"], "clip": 0.5}).encode()},
        "c.d/e": {"webp": jpeg(7, 8), "cls": b"12\n", "json": b'{"clip": 1, "sha256": "0"}', "seg.png": b"mask"},
    }


def facts(shard: ForeignShard, data: bytes) -> dict[str, tuple[Any, ...]]:
    """What is known of each key, with the payloads that the offsets lead to instead of the offsets."""
    members = ("image", "text", "cls", "json")
    return {
        row["key"]: (
            *(row[name] for name in ("width", "height", "caption", "captions", "label", "reason", "clip")),
            *(None if (at := row[f"{m}_offset"]) is None else data[at : at + row[f"{m}_length"]] for m in members),
        )
        for row in rows(shard)
    }


EXPECTED = {
    key: (*said, *[files.get(extension) for extension in (image, "txt", "cls", "json")])
    for (key, files), image, said in zip(
        three_samples().items(),
        ("jpg", "jpg", "webp"),
        [
            (20, 30, "the first", ["the first"], None, "", None),
            (40, 10, "second", ["second", "zwei"], None, "", 0.5),
            (8, 7, "", [], 12, "", 1.0),
        ],
        strict=True,
    )
}


@given(
    st.permutations([(f"{key}.{extension}", data) for key, files in three_samples().items() for extension, data in files.items()]),
    st.sampled_from(sorted(FORMATS)),
)
@settings(max_examples=25, deadline=None)
def test_members_may_come_in_any_order_and_format(files: list[tuple[str, bytes]], format: str) -> None:
    data = write(files, format=FORMATS[format])
    found = index(data)
    assert facts(found, data) == EXPECTED
    assert found.left_out == {".seg.png": 1}


def test_what_webdataset_writes(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, files in three_samples().items():
            writer.write({"__key__": key, **files})
    data = (tmp_path / "a.tar").read_bytes()
    assert facts(index(data), data) == EXPECTED


def test_tars_of_a_prepared_corpus_give_its_own_tables(corpus: Corpus) -> None:
    for number, shard in enumerate(corpus.shards):
        names = ("key", "width", "height", "caption", "captions", "label", "image_offset", "image_length", "text_offset", "json_offset")
        found = index(Path(shard.path).read_bytes()).table
        assert found.select(names).equals(corpus.read(number, columns=names))


def test_img2datasets_table_spares_the_texts() -> None:
    files = [
        ("00.jpg", jpeg(5, 6)),
        ("00.txt", b"in the tar"),
        ("00.json", b"{"),
        ("01.jpg", jpeg(7, 8)),
        ("01.txt", b"unknown to the table"),
    ]
    sidecar = pa.table(
        {"key": ["99", "00"], "caption": ["x", "in the table"], "similarity": [0.1, 0.3], "width": [1, 1], "status": ["failed", "success"]}
    )
    found = rows(index(write(files, format=tarfile.PAX_FORMAT), sidecar=sidecar))
    assert [(row["key"], row["caption"], row["similarity"], row["width"], row["status"]) for row in found] == [
        ("00", "in the table", 0.3, 6, "success"),
        ("01", "unknown to the table", None, 8, "success"),
    ]


def test_whatever_cannot_be_used_is_named() -> None:
    files = [
        ("good.jpg", jpeg()), ("good.txt", b"yes"), ("good.png", b"a second image"),
        ("text.txt", b"no image"), ("mute.jpg", jpeg()), ("empty.jpg", b""), ("cut.jpg", jpeg()[:100]), ("page.jpg", b"<html>"),
        ("json.jpg", jpeg()), ("json.json", b"[1]"), ("../up.jpg", jpeg()), ("twice.jpg", jpeg()), ("twice.txt", b"t"), ("twice.txt", b"t"),
        ("readme.md", b"# hello"),
    ]  # fmt: skip
    shard = index(write(files, format=tarfile.GNU_FORMAT))
    found = rows(shard)
    assert {row["path"]: row["reason"] for row in found} == {
        "good.jpg": "", "text.txt": "missing", "mute.jpg": "no-caption", "empty.jpg": "empty", "cut.jpg": "damaged",
        "page.jpg": "not-an-image", "json.jpg": "bad-record", "../up.jpg": "bad-record", "twice.jpg": "bad-record",
    }  # fmt: skip
    assert [row["key"] for row in found if row["status"] == "success"] == ["good"]
    assert all((row["key"] is None) == (row["status"] == "rejected") == bool(row["detail"]) for row in found)
    assert shard.left_out == {".md": 1, ".png": 1}


def test_further_columns_may_be_of_any_kind() -> None:
    records = [
        {"a": 1, "b": "x", "c": [1], "d": 2**70, "e": None, "f": True, "path": "p", "\ud800": "\udfff"},
        {"a": 0.5, "b": 2, "f": None},
    ]
    files = [(f"{i}.{e}", d) for i, r in enumerate(records) for e, d in (("jpg", jpeg()), ("txt", b"t"), ("json", json.dumps(r).encode()))]
    table = index(write(files, format=tarfile.USTAR_FORMAT)).table
    further = {name: table.column(name).to_pylist() for name in ("a", "b", "c", "d", "f", "source_path", "\\ud800")}
    assert further == {
        "a": [1.0, 0.5], "b": ["x", "2"], "c": ["[1]", None], "d": [str(2**70), None], "f": [True, None], "source_path": ["p", None],
        "\\ud800": ["\\udfff", None],
    }  # fmt: skip


def test_an_image_that_takes_pillow_down_is_left_out() -> None:
    turned = Image.Exif()
    turned[0x0112] = 3
    data = write([("a.jpg", jpeg()), ("a.txt", b"a"), ("b.jpg", jpeg(exif=turned)), ("b.txt", b"b")], format=tarfile.USTAR_FORMAT)
    asked: list[int] = []
    index(data, on_risk=asked.append)
    assert [data[offset:].startswith(jpeg(exif=turned)) for offset in asked] == [True]
    assert [row["reason"] for row in rows(index(data, crashed=asked))] == ["", "crashed"]


def test_captions_are_read_from_where_they_are(tmp_path: Path) -> None:
    """What the table counts, training finds: first the text file, then what the JSON adds."""
    files = three_samples() | {"f": {"jpg": jpeg(), "txt": b"one", "json": b'{"text": "two", "captions": ["one", " three "]}'}}
    path = tmp_path / "t.tar"
    path.write_bytes(write([(f"{k}.{e}", d) for k, fs in files.items() for e, d in fs.items()], format=tarfile.USTAR_FORMAT))
    reader = PackReader(seed=0, stride=1, channels=3, factor=1, shards=ShardReader())
    for row in rows(index(path.read_bytes())):
        members = {m: Member(*(-1 if row[f"{m}_{w}"] is None else row[f"{m}_{w}"] for w in ("offset", "length"))) for m in ("text", "json")}
        for number in range(max(1, len(row["captions"]))):
            sample: Any = SimpleNamespace(tar=str(path), texts=str(path), caption=number, image=Member(0, 0), mask=NO_MEMBER, **members)
            fetched = reader.fetch([sample])
            assert decode_caption(sample, fetched.texts[0], fetched.records[0]) == (row["captions"] or [""])[number]
