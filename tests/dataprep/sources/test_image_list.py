"""Lists of images: which columns are read, where paths start from, what may be named, and what becomes of rows that are none."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep.append import AppendMode
from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.rejections import NothingKept
from dataprep.shards.manifest import read_input_counts
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.open import SourceConfig, open_sources
from dataprep.sources.raw_sample import RawSample
from dataprep.sources.tabular.delimited import read_delimited
from dataprep.sources.tabular.tables import Table, kind_of, kind_of_list, read_jsonl
from pipeline.corpus.corpus import read_manifest
from tests import REPOSITORY
from tests.dataprep.helpers import digests, member, photo, row_of, start_prepare, table_rows, write_folder
from tests.pipeline.storage.servers import range_server

ROWS = [{"path": "a.jpg", "alt": "one", "score": 1}, {"path": "deep/b.jpg", "alt": "two", "score": 2}]


def csv_of(rows: list[dict[str, Any]], *, delimiter: str = ",") -> bytes:
    return "".join(delimiter.join(map(str, line)) + "\n" for line in [list(rows[0]), *(row.values() for row in rows)]).encode()


def jsonl_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=1)
    return buffer.getvalue()


def arrow_of(rows: list[dict[str, Any]], *, new: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    table = pa.Table.from_pylist(rows)
    buffer = io.BytesIO()
    with new(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


LISTS = {
    "list.csv": csv_of(ROWS),
    "list.tsv": csv_of(ROWS, delimiter="\t"),
    "list.jsonl": jsonl_of(ROWS),
    "list.jsonl.zst": zstandard.compress(jsonl_of(ROWS)),
    "list.csv.gz": gzip.compress(csv_of(ROWS)),
    "list.parquet": parquet_of(ROWS),
    "list.arrow": arrow_of(ROWS),
    "file.arrow": arrow_of(ROWS, new=pa.ipc.new_file),
}


def samples_of(spec: Path | str, **columns: Any) -> list[RawSample]:
    [source] = open_sources([str(spec)], columns=ColumnConfig(**columns))
    samples = list(source.samples())
    assert samples == list(source.samples())
    return samples


@pytest.mark.parametrize("name", LISTS)
def test_every_kind_of_list_gives_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LISTS[name])
    [source] = open_sources([str(tmp_path / name)])
    assert source.reads() == f"{name.partition('.')[0]}: {name}, images from path, captions from alt"
    samples = list(source.samples())
    assert [(sample.path, sample.file, sample.captions) for sample in samples] == [
        ("a.jpg", str(tmp_path / "a.jpg"), ("one",)),
        ("deep/b.jpg", str(tmp_path / "deep/b.jpg"), ("two",)),
    ]
    assert [float(str(sample.extra["score"])) for sample in samples] == [1, 2]
    assert source.expected() == (2 if name == "list.parquet" else None)
    digest = source.digest()
    (tmp_path / name).write_bytes(LISTS[name].replace(b"two", b"owt") if "." + name.partition(".")[2] in (".csv", ".jsonl") else b"")
    if name in ("list.csv", "list.jsonl"):
        assert open_sources([str(tmp_path / name)])[0].digest() != digest


def test_a_list_of_ones_own_may_name_anything(tmp_path: Path) -> None:
    rows = [{"image": name} for name in ("x.jpg", "../y.jpg", "/abs/z.jpg", "https://host/w.jpg", "s3://bucket/v.jpg", "", None, 5, "a\0b")]
    (tmp_path / "list.jsonl").write_bytes(jsonl_of(rows))
    samples = samples_of(tmp_path / "list.jsonl")
    assert [sample.file for sample in samples[:5]] == [
        str(tmp_path / "x.jpg"),
        str(tmp_path / "../y.jpg"),
        "/abs/z.jpg",
        "https://host/w.jpg",
        "s3://bucket/v.jpg",
    ]
    assert [sample.reason for sample in samples] == [""] * 5 + ["missing"] * 2 + ["bad-record"] * 2
    assert samples[3].extra["url"] == "https://host/w.jpg"


def test_a_list_from_elsewhere_may_not_reach_for_files_of_this_machine(tmp_path: Path) -> None:
    fine = ["x.jpg", "deep/y.jpg", "https://host/w.jpg", "zip://a.jpg::https://host/z.zip"]
    evil = [
        "/etc/passwd",
        "../x.jpg",
        "a/../../x.jpg",
        "file:///etc/passwd",
        "local://x",
        "zip://a.jpg::/home/x.zip",
        "simplecache::s3://b/x",
    ]
    (tmp_path / "list.jsonl").write_bytes(jsonl_of([{"url": name} for name in fine + evil]))
    with range_server(tmp_path) as server:
        samples = samples_of(f"{server.url}/list.jsonl")
        assert [sample.reason for sample in samples] == [""] * len(fine) + ["bad-record"] * len(evil)
        assert [sample.file for sample in samples[:2]] == [f"{server.url}/x.jpg", f"{server.url}/deep/y.jpg"]
        with pytest.raises(ValueError, match=r"^[^\n]*gone\.csv: has no readable rows[^\n]*$"):
            open_sources([f"{server.url}/gone.csv"])


def test_rows_that_are_none_are_bad_records(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('path,text\na.jpg,one\nb.jpg\nc.jpg,two,three\n"d.jpg,never closed')
    assert [(sample.path, sample.reason) for sample in samples_of(tmp_path / "list.csv")] == [
        ("a.jpg", ""),
        ("list.csv:3", "bad-record"),
        ("list.csv:4", "bad-record"),
        ("list.csv:5", "bad-record"),
    ]
    noise = random.Random(0)
    cut = zstandard.compress(jsonl_of([{"path": f"{number}.jpg", "note": noise.randbytes(500).hex()} for number in range(1000)]))
    (tmp_path / "cut.jsonl.zst").write_bytes(cut[: len(cut) // 2])
    *whole, last = samples_of(tmp_path / "cut.jsonl.zst")
    assert {sample.reason for sample in whole} == {""}
    assert 100 < len(whole) < 1000
    assert last.reason == "bad-record"
    data = bytearray(parquet_of([{"path": f"{number}.jpg", "text": "t"} for number in range(3)]))
    data[4:40] = bytes(36)  # of the first row group
    (tmp_path / "hurt.parquet").write_bytes(data)
    found = samples_of(tmp_path / "hurt.parquet")
    assert [sample.reason for sample in found] == ["bad-record", "", ""]
    assert "rows 1 to 1 of hurt.parquet" in found[0].detail


def test_one_broken_table_among_others_is_a_row_of_the_account(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"1.parquet": parquet_of([{"path": "a.jpg"}]), "0.parquet": b"PAR1", "2.parquet": b""})
    assert [sample.reason for sample in samples_of(tmp_path / "set")] == ["bad-record", "", "bad-record"]
    with pytest.raises(ValueError, match=r"^[^\n]*0\.parquet: has no readable rows[^\n]*$"):
        samples_of(tmp_path / "set/0.parquet")


def test_columns_can_be_said(tmp_path: Path) -> None:
    rows = [{"file": "a.jpg", "url": "b.jpg", "text": "short", "synthetic": "long", "many": ["x", "y"], "label": 1, "kind": "3"}]
    (tmp_path / "list.jsonl").write_bytes(jsonl_of(rows))
    [guessed] = samples_of(tmp_path / "list.jsonl")
    assert (guessed.path, guessed.captions, guessed.label) == ("a.jpg", ("short",), 1)
    [said] = samples_of(tmp_path / "list.jsonl", image="url", caption=("synthetic", "text", "many"), label="kind")
    assert (said.path, said.captions, said.label) == ("b.jpg", ("long", "short", "x", "y"), 3)
    assert said.extra == {"file": "a.jpg", "source_label": 1}
    with pytest.raises(ValueError, match=r"^[^\n]*has no column alt; there are file, url[^\n]*$"):
        samples_of(tmp_path / "list.jsonl", caption="alt")
    (tmp_path / "odd.csv").write_text("what,why\n1,2\n")
    with pytest.raises(ValueError, match=r"^[^\n]*Set columns\.image=NAME; there are what, why[^\n]*$"):
        samples_of(tmp_path / "odd.csv")


def test_values_that_json_has_no_word_for(tmp_path: Path) -> None:
    row = {
        "path": "a.jpg",
        "when": datetime(2020, 1, 2),
        "price": Decimal("1.5"),
        "raw": b"x",
        "nan": float("nan"),
        "in": {"a": [1], "b": b"x"},
    }
    (tmp_path / "list.parquet").write_bytes(parquet_of([row]))
    [sample] = samples_of(tmp_path / "list.parquet", image="path")
    assert sample.extra == {"when": "2020-01-02T00:00:00", "price": 1.5, "nan": None, "in": {"a": [1], "b": None}}


def test_images_in_tables_go_the_whole_way(tmp_path: Path) -> None:
    images = [photo(1), photo(2, format="PNG"), photo(3), b"", b"no image"]
    rows = [{"image": {"bytes": data, "path": f"{number}.jpg"}, "text": f"number {number}"} for number, data in enumerate(images)]
    (tmp_path / "some.parquet").write_bytes(parquet_of(rows))
    (tmp_path / "more.arrow").write_bytes(arrow_of([{"jpg": photo(4), "caption": "number 4"}]))
    sources = [str(tmp_path / "some.parquet"), str(tmp_path / "more.arrow")]
    for out, workers in (("C", 1), ("D", 2)):
        counts = prepare(sources, out=tmp_path / out, config=PrepareConfig(), workers=workers)
        assert (counts.kept, counts.rejected) == (4, {"missing": 1, "not-an-image": 1})
    assert digests(tmp_path / "C") == digests(tmp_path / "D")
    first, last = row_of(tmp_path / "C", "some.parquet:1"), row_of(tmp_path / "C", "more.arrow:1")
    assert [member(tmp_path / "C", row, "image") for row in (first, last)] == [images[0], photo(4)]
    assert (first["caption"], first["image_path"], last["caption"]) == ("number 0", "0.jpg", "number 4")


def test_the_datasets_librarys_parquet(shared: Path) -> None:
    samples = samples_of(shared / "corpora/hf_parquet")
    assert len(samples) == 60
    assert all(sample.data and sample.captions and not sample.reason for sample in samples)


def test_images_behind_urls_are_fetched_once(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(20)]
    write_folder(tmp_path / "web", {name: photo(number) for number, name in enumerate(names)})
    with range_server(tmp_path / "web") as server:
        rows = [{"url": f"{server.url}/{name}", "caption": name} for name in [*names, "gone.jpg"]]
        (tmp_path / "list.parquet").write_bytes(parquet_of(rows))
        counts = prepare([str(tmp_path / "list.parquet")], out=tmp_path / "C", config=PrepareConfig())
        assert (counts.kept, counts.rejected) == (20, {"missing": 1})
        assert all(times == 1 for request, times in server.asked.items() if request.startswith("GET"))
        [row] = [row for row in table_rows(tmp_path / "C") if row["path"].endswith("/3.jpg")]
        assert (member(tmp_path / "C", row, "image"), row["url"]) == (photo(3), f"{server.url}/3.jpg")


def test_an_image_that_takes_its_downloader_down_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(
        tmp_path,
        {
            "site/sitecustomize.py": b"import os, pipeline.storage.remote as remote\n"
            b"read = remote.read_ranges\n"
            b"remote.read_ranges = lambda ranges: os.abort() if any('boom' in part[0] for part in ranges) else read(ranges)\n"
        },
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{REPOSITORY}")
    names = ["0.jpg", "1.jpg", "boom.jpg", "3.jpg"]
    write_folder(tmp_path / "web", {name: photo(number) for number, name in enumerate(names)})
    with range_server(tmp_path / "web") as server:
        (tmp_path / "list.jsonl").write_bytes(jsonl_of([{"url": f"{server.url}/{name}", "text": name} for name in names]))
        assert start_prepare([tmp_path / "list.jsonl"], out=tmp_path / "C", config=PrepareConfig()).wait() == 0
    counts = read_input_counts(read_manifest(tmp_path / "C"))
    assert (counts.kept, counts.rejected) == (3, {"crashed": 1})
    assert [row["path"][-8:] for row in table_rows(tmp_path / "C") if row["reason"]] == ["boom.jpg"]


def test_long_lists_take_no_memory(tmp_path: Path) -> None:
    rows = [{"path": f"{number}.jpg", "text": f"image {number}", "score": number / 7} for number in range(10_000)]
    (tmp_path / "list.jsonl.zst").write_bytes(zstandard.compress(jsonl_of(rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet", row_group_size=2500)
    for name in ("list.jsonl.zst", "list.parquet"):
        [source] = open_sources([str(tmp_path / name)])
        tracemalloc.start()
        try:
            assert sum(1 for _ in source.samples()) == len(rows)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_list_and_its_images_behind_a_url(tmp_path: Path) -> None:
    write_folder(tmp_path / "web", {"set/a.jpg": photo(1), "set/b.jpg": photo(2), "set/list.csv": b"path,text\na.jpg,one\nb.jpg,two\n"})
    with range_server(tmp_path / "web") as server:
        counts = prepare([f"{server.url}/set/list.csv"], out=tmp_path / "C", config=PrepareConfig())
    assert counts.kept == 2


def test_names_and_tags(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        write_folder(tmp_path, {f"{name}.jpg": photo(seed), f"{name}.csv": f"path,alt,note\n{name}.jpg,{name},{name}\n".encode()})
    settings = {
        "sources": {
            "web": {"tags": ["crawl", "2024"], "columns": {"caption": ["note", "alt"]}},
            "art": {"path": str(tmp_path / "two.csv"), "tags": "owned, old"},
        },
    }
    config = PrepareConfig.model_validate(settings)
    assert config.sources["art"].tags == ("owned", "old")
    said: list[str] = []
    prepare([f"web={tmp_path / 'one.csv'}"], out=tmp_path / "C", config=config, announce=said.append)
    rows = {row["source"]: row for row in table_rows(tmp_path / "C")}
    assert {name: row["source_tags"] for name, row in rows.items()} == {"web": "crawl, 2024", "art": "owned, old"}
    assert rows["web"]["captions"] == ["one"]
    assert said == [
        "web: one.csv, images from path, captions from note, alt",
        "art: two.csv, images from path, captions from alt",
    ]
    manifest = json.loads((tmp_path / "C/manifest.json").read_text())
    assert str(tmp_path) not in json.dumps(manifest)
    assert [source["tags"] for source in manifest["sources"]] == [["crawl", "2024"], ["owned", "old"]]
    with pytest.raises(ValueError, match="another sources"):
        prepare([f"web={tmp_path / 'one.csv'}"], out=tmp_path / "C", config=PrepareConfig(sources={"art": config.sources["art"]}))


def test_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path\nx.jpg\n")
    spec = str(tmp_path / "a.csv")
    assert [source.name for source in open_sources([spec, f"b={spec}", spec])] == ["a", "b", "a-2"]
    with pytest.raises(ValueError, match="another source has this name"):
        open_sources([f"b={spec}", f"b={spec}"])
    with pytest.raises(ValueError, match=r"sources\.b: has no path"):
        open_sources([spec], named={"b": SourceConfig(tags=("x",))})
    with pytest.raises(ValueError, match="b=nowhere: neither a setting nor a source"):
        open_sources(["b=nowhere"])


def test_kinds_by_name() -> None:
    names = ["a.csv", "A.TSV", "a.jsonl.zst", "https://h/a.parquet?x=1", "a.parquet.zst", "csv", "a.txt", "a.json", "a.json.gz"]
    assert [kind_of(name) for name in names] == ["csv", "tsv", "jsonl", "parquet", None, None, None, "json", "json"]


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from(["csv", "tsv", "jsonl", "jsonl.zst", "csv.gz", "parquet", "arrow"]), st.booleans())
def test_no_bytes_end_a_run(tmp_path_factory: pytest.TempPathFactory, junk: bytes, ending: str, begins_well: bool) -> None:
    path = tmp_path_factory.mktemp("junk") / f"list.{ending}"
    path.write_bytes((LISTS[f"list.{ending}"] if begins_well else b"") + junk)
    try:
        rows = list(Table(str(path)).rows())
    except (ValueError, OSError):  # while it is opened: the source is refused in one line
        return
    assert all(isinstance(record, (dict, str)) for _, record in rows)


WITHOUT_NUL = st.text(st.characters(codec="utf-8", exclude_characters="\0"))  # Python 3.10 does not write one


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(WITHOUT_NUL, WITHOUT_NUL), max_size=5))
def test_what_csv_writes_is_read_back(rows: list[tuple[str, str]]) -> None:
    import csv

    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *rows])
    found = list(read_delimited(io.BytesIO(text.getvalue().encode("utf-8", "replace"))))
    assert [record for _, record in found] == [{"a": a, "b": b} for a, b in rows]


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), max_size=5))
def test_what_json_writes_is_read_back(rows: list[dict[str, Any]]) -> None:
    assert [record for _, record in read_jsonl(io.BytesIO(jsonl_of(rows)))] == rows


def test_images_in_text_columns(tmp_path: Path) -> None:
    data = photo(1)
    plain = base64.b64encode(data).decode()
    texts = {
        "base64": plain,
        "unpadded": plain.rstrip("="),
        "for urls": base64.urlsafe_b64encode(data).decode(),
        "in lines": base64.encodebytes(data).decode(),
        "data url": f"data:image/jpeg;base64,{plain}",
        "percent": f"data:image/jpeg,{quote(data)}",
    }
    rows: list[dict[str, Any]] = [{"image": text, "caption": name} for name, text in texts.items()]
    rows.append({"image": {"bytes": plain, "path": None}, "caption": "nested"})
    rows += [{"image": text, "caption": "bad"} for text in ("data:image/jpeg", "data:image/png;base64,&&", "x y! " * 2000)]
    for name, lists in (("list.jsonl", jsonl_of(rows)), ("list.json", json.dumps(rows).encode())):
        (tmp_path / name).write_bytes(lists)
        *found, no_comma, no_base64, no_name = samples_of(tmp_path / name)
        assert [sample.data == data for sample in found] == [True] * 7
        assert {sample.reason for sample in (no_comma, no_base64, no_name)} == {"bad-record"}
    (tmp_path / ("deep/" * 20)).mkdir(parents=True)
    (tmp_path / "paths.jsonl").write_bytes(jsonl_of([{"image": f"{'deep/' * 20}{'a' * 40}.jpg"}, {"image": "a" * 200}]))
    assert [sample.data for sample in samples_of(tmp_path / "paths.jsonl")] == [None, None]


def test_text_labels_become_classes_in_sorted_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", {f"{n}.jpg": photo(n) for n in range(3)})
    write_folder(tmp_path / "two", {f"{n}.jpg": photo(n + 3) for n in range(3)})
    (tmp_path / "one/list.csv").write_text("file,label\n0.jpg,dog\n1.jpg,cat\n2.jpg,7\n")
    (tmp_path / "two/metadata.jsonl").write_bytes(jsonl_of([{"file_name": f"{n}.jpg", "label": name} for n, name in enumerate("bda")]))
    said: list[str] = []
    sources = [str(tmp_path / "one/list.csv"), str(tmp_path / "two")]
    counts = prepare(sources, out=tmp_path / "C", config=PrepareConfig(), announce=said.append)
    manifest = json.loads((tmp_path / "C/manifest.json").read_text())
    assert manifest["classes"] == {"7": 0, "a": 1, "b": 2, "cat": 3, "d": 4, "dog": 5}
    assert all(row["label"] == manifest["classes"][row["class_name"]] for row in table_rows(tmp_path / "C"))
    assert manifest["has_classes"]
    note = "6 text labels are classes in sorted order: 7 is 0, a is 1, b is 2, cat is 3, d is 4, dog is 5"
    assert note in counts.notes
    assert said[-1] == note
    write_folder(tmp_path / "three", {"6.jpg": photo(6), "7.jpg": photo(7), "l.csv": b"file,label\n6.jpg,cat\n7.jpg,bird\n"})
    grown = prepare(
        [str(tmp_path / "three/l.csv")], out=tmp_path / "C", config=PrepareConfig(), append_mode=AppendMode(append=True, retry=False)
    )
    assert (grown.kept, grown.rejected) == (7, {"no-caption": 1})
    assert json.loads((tmp_path / "C/manifest.json").read_text())["classes"] == manifest["classes"]
    assert [row["label"] for row in table_rows(tmp_path / "C") if row["path"] == "6.jpg"] == [3]


def test_nested_columns_and_texts_that_hold_lists(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]
    row = {
        "image": "a.jpg",
        "talk": talk,
        "meta": {"alt": "deep"},
        "json": '["a", "b"]',
        "repr": "['a', \"b\"]",
        "not": "[sic] a",
        "one": 3,
    }
    (tmp_path / "list.jsonl").write_bytes(jsonl_of([row]))
    for caption, wanted in {
        "talk.1.value": ("answer",),
        "talk.value": ("ask", "answer"),
        "meta.alt": ("deep",),
        "json": ("a", "b"),
        "repr": ("a", "b"),
        "not": ("[sic] a",),
        "talk.9.value": (),
    }.items():
        [sample] = samples_of(tmp_path / "list.jsonl", caption=caption)
        assert sample.captions == wanted, caption
    [sample] = samples_of(tmp_path / "list.jsonl", caption="talk")
    assert sample.detail == "talk holds objects, not texts: name a part of it, such as columns.caption=talk.0.from or talk.0.value"
    [sample] = samples_of(tmp_path / "list.jsonl", caption="one")
    assert sample.detail == "one holds 3, not a text"
    with pytest.raises(ValueError, match=r"has no column tolk\.0"):
        samples_of(tmp_path / "list.jsonl", caption="tolk.0")


def test_rows_of_one_image_are_captions_of_one_input(tmp_path: Path) -> None:
    write_folder(tmp_path, {"Images/0.jpg": photo(0), "Images/1.jpg": photo(1)})
    rows = "".join(f"{n}.jpg,caption {n}.{k}\n" for n in range(2) for k in range(3))
    (tmp_path / "captions.txt").write_text(f"image,caption\n{rows}1.jpg,caption 1.2\n")
    counts = prepare([str(tmp_path / "captions.txt")], out=tmp_path / "C", config=PrepareConfig())
    assert (counts.inputs, counts.kept, counts.rejected) == (3, 2, {"duplicate": 1})
    assert counts.notes == ["captions: 4 row(s) are further captions of the image in the row before"]
    kept = {row["path"]: row["captions"] for row in table_rows(tmp_path / "C") if row["key"]}
    assert kept == {f"{n}.jpg": [f"caption {n}.{k}" for k in range(3)] for n in range(2)}
    assert [kind_of_list(str(tmp_path / name)) for name in ("captions.txt", "a.json")] == ["csv", "json"]
    (tmp_path / "notes.txt").write_text("no table\n")
    with pytest.raises(ValueError, match=r"notes\.txt: not a source that can be read"):
        open_sources([str(tmp_path / "notes.txt")])


@pytest.mark.parametrize("name", ["a[1].csv", "b{1,2}.csv", "c*.csv", "d?.csv", "{0..9}[x]/e.csv", "[0-9]/f*.csv"])
def test_a_name_that_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, {name: b"path,text\nx[1].jpg,one\n", "cc.csv": b"path\ny.jpg\n", "a1.csv": b"path\nz.jpg\n"})
    assert [sample.path for sample in samples_of(tmp_path / name)] == ["x[1].jpg"]
    folder = (tmp_path / name).parent
    if folder != tmp_path:
        assert [sample.path for sample in samples_of(folder / "?*.csv")] == ["x[1].jpg"]


def test_a_table_whose_rows_are_all_bad_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,text\na.jpg\nb.jpg,1,2\n")
    with pytest.raises(NothingKept, match="bad-record 2"):
        prepare([str(tmp_path / "list.csv")], out=tmp_path / "C", config=PrepareConfig())
