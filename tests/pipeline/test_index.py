from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.index import Corpus
from tests.pipeline.conftest import Sample, write_corpus


def edit_manifest(corpus: Corpus, **changes: object) -> None:
    file = corpus.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def error_of_opening(path: Path) -> str:
    with pytest.raises(ValueError, match=str(path)) as caught:
        Corpus.open(path).read(0, columns=("key",))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_corpus_knows_its_shards(corpus: Corpus) -> None:
    assert (corpus.name, corpus.count, [shard.count for shard in corpus.shards]) == ("corpus", 24, [14, 10])
    rows = [corpus.read(shard, columns=("key", "width")).to_pylist() for shard in range(2)]
    assert [row["key"] for row in rows[1]] == [f"000001{i:04d}" for i in range(10)]
    assert Corpus.open(corpus.path, name="other").name == "other"


def test_the_digest_follows_the_contents_not_the_place(corpus: Corpus, tmp_path: Path) -> None:
    shards = [[Sample(20, 30, ("a",))], [Sample(40, 30, ("b",))]]
    first, second = (write_corpus(tmp_path / name, shards=shards) for name in ("one", "two"))
    assert first.digest == second.digest != corpus.digest
    edit_manifest(second, notes=["said something else"])
    assert Corpus.open(second.path).digest == first.digest


def test_what_is_no_corpus(tmp_path: Path) -> None:
    assert "no such folder" in error_of_opening(tmp_path / "absent")
    assert "not a corpus" in error_of_opening(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert "not JSON" in error_of_opening(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    assert "damaged ('shards')" in error_of_opening(tmp_path)


@pytest.mark.parametrize("found", [2, None, "1"])
def test_unknown_format(corpus: Corpus, found: object) -> None:
    edit_manifest(corpus, format=found)
    assert f"format {found!r}, this version of tim reads format 1" in error_of_opening(corpus.path)


def test_files_that_are_missing_or_cut_off(corpus: Corpus) -> None:
    tar = Path(corpus.shards[1].path)
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    assert f"000001.tar has {len(data) - 512} bytes, manifest.json says {len(data)}" in error_of_opening(corpus.path)
    tar.unlink()
    assert "lacks the shard 000001.tar" in error_of_opening(corpus.path)
    tar.write_bytes(data)
    (corpus.path / "index.parquet").write_bytes(b"PAR1")
    assert "not a parquet file" in error_of_opening(corpus.path)
    (corpus.path / "index.parquet").unlink()
    assert "lacks index.parquet" in error_of_opening(corpus.path)


def test_an_index_of_another_corpus(corpus: Corpus, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", shards=[[Sample(20, 30, ("a",))]])
    (corpus.path / "index.parquet").write_bytes((other.path / "index.parquet").read_bytes())
    assert "1 rows in 1 groups, manifest.json says 24 in 2 shards" in error_of_opening(corpus.path)


def test_a_column_that_is_missing(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="has no column 'score'"):
        corpus.read(0, columns=("key", "score"))


def test_only_one_shard_is_read_at_a_time(corpus: Corpus) -> None:
    assert pq.ParquetFile(corpus.path / "index.parquet").num_row_groups == 2
    assert corpus.read(1, columns=("key",)).num_rows == 10
