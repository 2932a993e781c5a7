"""What follows from the rest of a corpus is made again with the same bytes, and what is lost is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dataprep.checks.repair import repair
from dataprep.checks.verify import verify
from dataprep.index_tars import index
from dataprep.prepare import PrepareConfig, prepare
from pipeline.corpus.corpus import Corpus
from tests.dataprep.helpers import digests, photo, table_rows, write_folder

CONFIG = PrepareConfig.model_validate({"name": "mended", "shards": {"max_samples": 4}})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with classes, rejected inputs, a near duplicate and columns of every kind, some of them not filled everywhere."""
    folder = tmp_path_factory.mktemp("repair")
    files = {f"{number}.jpg": photo(number, height=60 + number, width=80) for number in range(9)}
    files |= {"like.jpg": photo(3, height=120, width=160), "cut.jpg": photo(20)[:200], "thin.jpg": photo(21, height=18, width=400)}
    rows = [
        {
            "file_name": name,
            "text": f"ein Bild «{name}»",
            "label": place,
            "clip": place / 7,
            "n": place,
            "ok": place % 2 == 0,
            "tags": ["a", place],
        }
        | ({"url": f"https://example.org/{name}", "half": 0.5, "few": 3, "yes": True} if place % 2 else {})
        for place, name in enumerate(files)
    ]
    write_folder(folder / "set", files, rows=rows)
    counts = prepare([str(folder / "set")], out=folder / "C", config=CONFIG)
    assert (counts.kept, counts.rejected, counts.shards) == (10, {"aspect": 1, "damaged": 1}, 3)
    return folder / "C"


@pytest.fixture
def corpus(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "C")
    return tmp_path / "C"


def kept(corpus: Path, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in without} for row in table_rows(corpus) if row["key"]]


def test_what_is_sound_is_not_touched(corpus: Path) -> None:
    before = digests(corpus)
    times = {path.name: path.stat().st_mtime_ns for path in corpus.glob("0*")}
    found = repair(corpus)
    assert (found.done, found.lost) == ([], [])
    assert digests(corpus) == before
    assert {path.name: path.stat().st_mtime_ns for path in corpus.glob("0*")} == times


def test_what_follows_from_tables_and_tars_comes_back_with_its_bytes(corpus: Path) -> None:
    before = digests(corpus)
    names = ["000001_stats.json", "index.json", "index.parquet", "README.md", "report.html"]
    for name in names[:3]:
        (corpus / name).unlink()
    for name in names[3:]:
        (corpus / name).write_text("scribble")
    found = repair(corpus)
    assert sorted(line.split(":")[0] for line in found.done) == sorted(names)
    assert found.lost == []
    assert digests(corpus) == before


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_table_comes_back_but_for_what_was_rejected(corpus: Path, sound: Path, with_index: bool, how: str) -> None:
    rejecting = next(path for path in sorted(corpus.glob("0*.parquet")) if "damaged" in pq.read_table(path)["reason"].to_pylist())
    if how == "missing":
        rejecting.unlink()
    else:
        rejecting.write_bytes(rejecting.read_bytes()[:-40])
    if not with_index:
        (corpus / "index.parquet").unlink()
    before = len([row for row in table_rows(sound) if row["reason"]])
    found = repair(corpus, workers=2)
    assert verify(corpus).problems == []
    lost = before - len([row for row in table_rows(corpus) if row["reason"]])
    assert lost > 0
    assert f"{rejecting.name}: which inputs were rejected, and why: {lost} rows" in found.lost
    elsewhere = () if with_index else ("source", "path", "detail", "duplicate_of", "near_duplicate_of")
    assert kept(corpus, without=elsewhere) == kept(sound, without=elsewhere)
    assert len(found.lost) == (1 if with_index else 2)
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["lost"] == {rejecting.name: lost}
    assert manifest["rejected"] == {"aspect": 1, "damaged": 1}
    assert Corpus.open(corpus).count == 10
    again = digests(corpus)
    assert repair(corpus).done == []
    assert digests(corpus) == again


@pytest.mark.parametrize(
    "also", [[], ["000000_stats.json", "000002_stats.json"], ["index.parquet", "index.json", "README.md", "report.html"]]
)
def test_without_its_manifest_a_corpus_can_be_used(corpus: Path, sound: Path, also: list[str]) -> None:
    for name in ["manifest.json", *also]:
        (corpus / name).unlink()
    found = repair(corpus)
    assert [line.split(":")[0] for line in found.lost] == ["manifest.json"]
    assert verify(corpus).problems == []
    old, new = (json.loads((path / "manifest.json").read_text()) for path in (sound, corpus))
    same = ("shards", "totals", "rejected", "columns", "has_classes", "index")
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert new["name"] == ("C" if "index.json" in also else "mended")
    assert digests(corpus)["000001.tar"] == digests(sound)["000001.tar"]
    assert Corpus.open(corpus).count == 10


def test_samples_that_are_lost_are_told(corpus: Path) -> None:
    (corpus / "000001.tar").unlink()
    found = repair(corpus)
    assert found.lost == ["000001.tar: 4 samples: restore the file, or prepare the corpus again"]
    assert verify(corpus).problems == ["000001.tar: is missing"]
    for name in ("000001.parquet", "index.parquet"):
        (corpus / name).unlink()
    before = digests(corpus)
    found = repair(corpus)
    assert any("both it and 000001.tar are damaged" in line for line in found.lost)
    assert digests(corpus) == before


def test_what_cannot_be_repaired_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^[^\n]*not a (corpus|local folder)[^\n]*$"):
            repair(place)
    index([str(corpus / "000000.tar")], out=tmp_path / "I")
    with pytest.raises(ValueError, match="run `tim index` again with the same tars"):
        repair(tmp_path / "I")
    (corpus / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format 9"):
        repair(corpus)
    for name in ("manifest.json", "000001_stats.json", "000001.parquet"):
        (corpus / name).unlink()
    with pytest.raises(ValueError, match=r"a repair needs 000001\.parquet"):
        repair(corpus)
