"""Finished corpora as sources: what sidecars say goes along, takedown marks hold, broken sidecars are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep.checks.verify import verify
from dataprep.index_tars import index
from dataprep.prepare import AppendMode, PrepareConfig, prepare
from dataprep.sidecars.annotate import annotate
from tests.dataprep.helpers import digests, member, photo, row_of, table_rows, write_folder, write_tar
from tests.pipeline.storage.servers import RangeServer, range_server

COUNT = 12
TAKEN_DOWN = ("001.jpg", "007.jpg")


def annotated(corpus: Path, rows: list[dict[str, Any]], **told: Any) -> None:
    file = corpus.parent / f"{told.get('name', 'table')}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    annotate(corpus, table=file, **told)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in three shards: scored, recaptioned, two of them taken down; one input was rejected."""
    files = {f"{number:03d}.jpg": photo(number, height=60 + number) for number in range(COUNT)}
    rows: list[dict[str, Any]] = [
        {"file_name": name, "captions": [f"old {name}", f"older {name}"], "url": f"http://x/{name}", "rank": place}
        for place, name in enumerate(files)
    ]
    files["011.png"] = photo(50, format="PNG", height=64)
    rows.append({"file_name": "011.png", "captions": ["png"], "url": "http://x/png", "rank": 50})
    folder = write_folder(
        tmp_path_factory.mktemp("source") / "set", files, rows=[*rows, {"file_name": "none.jpg", "captions": ["missing"]}]
    )
    config = {"shards": {"max_samples": 5}, "sources": {"set": {"path": str(folder), "tags": ["mine"]}}}
    out = tmp_path_factory.mktemp("prepared") / "C"
    prepare([], out=out, config=PrepareConfig.model_validate(config))
    keys = {row["path"]: row["key"] for row in table_rows(out) if row["key"]}
    annotated(out, [{"key": key, "similarity": int(path[:3]) / 10} for path, key in keys.items()], on="key", name="scores")
    new = [{"key": keys[name], "caption": f"new {name}"} for name in ("002.jpg", "003.jpg")]
    annotated(out, new, on="key", name="recaptioned")
    annotated(out, [{"url": f"http://x/{name}"} for name in TAKEN_DOWN], on="url", name="requests", mark="takedown")
    return out


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "C"))


def config(**sections: Any) -> PrepareConfig:
    return PrepareConfig.model_validate(sections)


def kept(corpus: Path) -> dict[str, dict[str, Any]]:
    """Kept rows by what their first source called them."""
    return {row["source_path"]: row for row in table_rows(corpus) if row["key"]}


def test_a_filtered_corpus_holds_what_was_asked_for_and_nothing_that_was_taken_down(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    counts = prepare([str(corpus)], out=out, config=config(filters={"where": {"good": "similarity >= 0.15"}}))
    assert verify(out).problems == []
    assert (counts.inputs, counts.kept, counts.rejected) == (13, 10, {"filter:good": 1, "takedown": 2})
    found = kept(out)
    assert not found.keys() & {*TAKEN_DOWN, "000.jpg"}
    old = {row["path"]: row for row in table_rows(corpus) if row["key"]}
    for path, row in found.items():
        assert (row["source"], row["source_source"], row["path"]) == ("C", "set", old[path]["key"])
        assert row["similarity"] == (pytest.approx(int(path[:3]) / 10))
        assert (row["rank"], row["url"], row["source_tags"]) == (old[path]["rank"], old[path]["url"], "mine")
        assert (row["original_width"], row["original_height"]) == (old[path]["original_width"], old[path]["original_height"])
        assert member(out, row, "image") == member(corpus, old[path], "image")
        assert json.loads(member(out, row, "json"))["similarity"] == row["similarity"]
    assert found["003.jpg"]["captions"] == ["new 003.jpg", "old 003.jpg", "older 003.jpg"]
    assert found["003.jpg"]["caption"] == "new 003.jpg"
    assert found["004.jpg"]["captions"] == ["old 004.jpg", "older 004.jpg"]
    gone = [row for row in table_rows(out) if row["reason"] == "takedown"]
    assert sorted(row["path"] for row in gone) == sorted(old[name]["key"] for name in TAKEN_DOWN)
    assert {row["detail"] for row in gone} == {"marked in the corpus's sidecar 'requests'"}
    everything = b"".join(path.read_bytes() for path in out.glob("*.*") if path.suffix != ".tar")
    assert not any(row["caption"] for row in gone)
    assert not any(f"http://x/{name}".encode() in everything for name in TAKEN_DOWN)
    assert "takedown" not in pq.read_schema(out / "000000.parquet").names


def test_a_corpus_of_a_corpus_of_a_corpus_keeps_the_first_origin(corpus: Path, tmp_path: Path) -> None:
    for source, out in (("C", "D"), ("D", "E")):
        prepare([str(tmp_path / source)], out=tmp_path / out, config=config(images={"max_side": 60}))
    row = kept(tmp_path / "E")["010.jpg"]
    assert (row["source"], row["source_source"], row["original_height"], row["height"]) == ("D", "set", 70, 60)
    assert row["rank"] == 10


def test_tars_of_a_corpus_are_the_corpus(corpus: Path, tmp_path: Path) -> None:
    counts = prepare([str(corpus / "{000000..000002}.tar")], out=tmp_path / "D", config=config())
    assert counts.rejected["takedown"] == 2
    counts = prepare([str(corpus / "000000.tar")], out=tmp_path / "E", config=config())
    assert counts.inputs == 5
    other = write_tar(tmp_path / "other.tar", [("0.jpg", photo(90)), ("0.txt", b"other")])
    with pytest.raises(ValueError, match="name each corpus, and other tars, as separate sources"):
        prepare([str(tmp_path / "{C/000000,other}.tar")], out=tmp_path / "F", config=config())
    with pytest.raises(ValueError, match=r"holds corpora .*: name each of them"):
        prepare([str(tmp_path)], out=tmp_path.parent / "G", config=config())
    assert other.is_file()


def test_several_corpora_append_and_against(corpus: Path, tmp_path: Path) -> None:
    second = write_folder(tmp_path / "more", {"a.jpg": photo(70), "b.jpg": photo(3, height=63)}, rows=None)
    for name in ("a", "b"):
        (second / f"{name}.txt").write_text(name)
    prepare([str(second)], out=tmp_path / "D", config=config())
    both = prepare([str(corpus), str(tmp_path / "D")], out=tmp_path / "E", config=config())
    assert (both.inputs, both.kept, both.rejected) == (15, 12, {"duplicate": 1, "takedown": 2})
    prepare([str(tmp_path / "D")], out=tmp_path / "F", config=config())
    grown = prepare([str(corpus)], out=tmp_path / "F", config=config(), append_mode=AppendMode(append=True, retry=False))
    assert (grown.kept, grown.rejected) == (12, {"duplicate": 1, "takedown": 2})
    assert verify(tmp_path / "F").problems == []
    again = prepare([str(corpus)], out=tmp_path / "F", config=config(), append_mode=AppendMode(append=True, retry=True))
    assert again.kept == 12
    known = prepare([str(tmp_path / "D")], out=tmp_path / "H", config=config(), against=[corpus])
    assert known.rejected == {"duplicate": 1}


def test_the_number_of_workers_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare([str(corpus)], out=tmp_path / f"w{workers}", config=config(images={"max_side": 40}), workers=workers)
    assert digests(tmp_path / "w1") == digests(tmp_path / "w3")


def test_no_copy_brings_back_what_was_taken_down(corpus: Path, tmp_path: Path) -> None:
    raw = write_folder(
        tmp_path / "raw", {f"{name}.jpg": photo(number, height=60 + number) for name, number in (("a", 1), ("b", 2), ("c", 40))}
    )
    for name in "abc":
        (raw / f"{name}.txt").write_text(f"raw {name}")
    both = prepare([str(raw), str(corpus)], out=tmp_path / "both", config=config())
    assert (both.inputs, both.kept, both.rejected) == (16, 12, {"duplicate": 1, "takedown": 3})
    assert row_of(tmp_path / "both", "a.jpg")["reason"] == "takedown"
    assert row_of(tmp_path / "both", "a.jpg")["caption"] == ""
    prepare([str(corpus)], out=tmp_path / "D", config=config())
    (raw / "c.json").write_text('{"rank": 12, "similarity": 0.5}')
    grown = prepare([str(raw)], out=tmp_path / "D", config=config(), append_mode=AppendMode(append=True, retry=True))
    assert grown.rejected == {"bad-record": 1, "takedown": 3}  # b lacks what every sample of the corpus has
    assert not any("raw a" in path.read_text() for path in (tmp_path / "D").glob("*.json"))
    for name in ("both", "D"):
        assert verify(tmp_path / name).problems == []


@pytest.fixture
def server(prepared: Path) -> Any:
    with range_server(prepared.parent) as running:
        yield running


def test_a_corpus_at_a_url(prepared: Path, server: RangeServer, tmp_path: Path) -> None:
    out = tmp_path / "D"
    counts = prepare([f"{server.url}/C"], out=out, config=config(filters={"where": {"good": "similarity >= 0.15"}}))
    assert counts.rejected == {"filter:good": 1, "takedown": 2}
    prepare([str(prepared)], out=tmp_path / "E", config=config(filters={"where": {"good": "similarity >= 0.15"}}))
    assert {p: d for p, d in digests(out).items() if p.endswith((".tar", ".parquet"))} == {
        p: d for p, d in digests(tmp_path / "E").items() if p.endswith((".tar", ".parquet"))
    }


def test_a_corpus_of_foreign_tars(tmp_path: Path) -> None:
    for number in range(2):
        members = [
            (f"{place}.{extension}", data)
            for place in range(4)
            for extension, data in (("jpg", photo(10 * number + place)), ("txt", b"old"), ("json", b'{"score": %d}' % place))
        ]
        write_tar(tmp_path / f"{number:05d}.tar", members)
    index([str(tmp_path / "{00000..00001}.tar")], out=tmp_path / "I")
    annotated(tmp_path / "I", [{"key": "000001/2", "caption": "new"}], on="key", name="captions")
    annotated(tmp_path / "I", [{"key": "000000/3"}], on="key", name="gone", mark="takedown")
    counts = prepare([str(tmp_path / "I")], out=tmp_path / "D", config=config(filters={"where": {"good": "score >= 1"}}))
    assert (counts.inputs, counts.rejected) == (8, {"filter:good": 2, "takedown": 1})
    assert row_of(tmp_path / "D", "000001/2")["captions"] == ["new", "old"]
    assert verify(tmp_path / "D").problems == []


def test_filters_may_ask_what_is_not_stored(corpus: Path, tmp_path: Path) -> None:
    where = {"one": "source == 'set' and near_duplicate_of == ''"}
    counts = prepare([str(corpus)], out=tmp_path / "D", config=config(filters={"where": where}))
    assert counts.rejected == {"takedown": 2}
    with pytest.raises(ValueError, match="have no column similarty; did you mean similarity"):
        prepare([str(corpus)], out=tmp_path / "E", config=config(filters={"where": {"x": "similarty > 0"}}))
    counts = prepare([str(corpus)], out=tmp_path / "F", config=config(columns={"caption": "url"}))
    assert row_of(tmp_path / "F", next(row["path"] for row in table_rows(tmp_path / "F") if row["key"]))["caption"].startswith("http://x/")


@pytest.mark.parametrize("damage", ["missing", "changed", "stale", "unlisted", "manifest"])
def test_broken_sidecars_are_refused_by_name(corpus: Path, tmp_path: Path, damage: str) -> None:
    table, listed = corpus / "000001.requests.parquet", corpus / "sidecars.json"
    told = json.loads(listed.read_text())
    if damage == "missing":
        table.unlink()
    elif damage == "changed":
        table.write_bytes((corpus / "000002.requests.parquet").read_bytes())
    elif damage == "stale":
        told["sidecars"][2]["shards"]["000001.parquet"]["of"] = "0" * 64
        listed.write_text(json.dumps(told))
    elif damage == "unlisted":
        del told["sidecars"][2]["shards"]["000001.parquet"]
        listed.write_text(json.dumps(told))
    else:
        (corpus / "manifest.json").unlink()
    with pytest.raises(ValueError, match="repair" if damage == "manifest" else "requests"):
        prepare([str(corpus)], out=tmp_path / "D", config=config())
    assert not (tmp_path / "D" / "manifest.json").exists()
