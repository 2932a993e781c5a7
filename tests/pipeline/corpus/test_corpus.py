from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.corpus import Corpus
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
    table = corpus.path / "000000.parquet"
    table.write_bytes(b"PAR1")
    assert "000000.parquet cannot be read" in error_of_opening(corpus.path)
    table.unlink()
    assert "lacks 000000.parquet" in error_of_opening(corpus.path)


def test_a_table_of_another_corpus(corpus: Corpus, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", shards=[[Sample(20, 30, ("a",))]])
    (corpus.path / "000000.parquet").write_bytes((other.path / "000000.parquet").read_bytes())
    assert "000000.parquet has 1 samples, manifest.json says 14" in error_of_opening(corpus.path)


def test_a_column_that_is_missing(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="has no column 'score'"):
        corpus.read(0, columns=("key", "score"))


def test_rejected_rows_are_no_samples(corpus: Corpus) -> None:
    file = corpus.path / "000001.parquet"
    table = pq.read_table(file)
    rejected = table.slice(0, 2).set_column(0, "key", pa.nulls(2, pa.string()))
    pq.write_table(pa.concat_tables([table.slice(0, 3), rejected, table.slice(3)]), file)
    assert corpus.read(1, columns=("key", "width")).equals(table.select(["key", "width"]))


@pytest.mark.parametrize("name", ["../000000.tar", "sub/000000.tar", "..", ""])
@pytest.mark.parametrize("what", ["name", "table"])
def test_no_name_leads_out_of_the_folder(corpus: Corpus, name: str, what: str) -> None:
    shards = json.loads((corpus.path / "manifest.json").read_text())["shards"]
    edit_manifest(corpus, shards=[{**shards[0], what: name}])
    assert f"names {name!r}, which is outside the folder" in error_of_opening(corpus.path)


def test_shards_may_lie_where_the_manifest_says_in_full(corpus: Corpus, tmp_path: Path) -> None:
    shards = json.loads((corpus.path / "manifest.json").read_text())["shards"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(corpus.shards[0].path).rename(elsewhere / "a.tar")
    edit_manifest(corpus, shards=[{**shards[0], "name": str(elsewhere / "a.tar")}, {**shards[1], "name": "s3://bucket/b.tar"}])
    opened = Corpus.open(corpus.path)
    assert [shard.path for shard in opened.shards] == [str(elsewhere / "a.tar"), "s3://bucket/b.tar"]
    assert opened.digest == corpus.digest


def test_shards_of_an_index_need_not_agree_on_further_columns(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, shards=[[], *[[Sample(20, 30, ("a",))]] * 3])
    for shard, values in ((1, [0.5]), (3, ["high"])):
        file = tmp_path / f"00000{shard}.parquet"
        pq.write_table(pq.read_table(file).append_column("clip", pa.array(values)), file)
    assert corpus.schema.field("clip").type == pa.float64()
    assert [corpus.read(shard, columns=("clip",)).column("clip").to_pylist() for shard in range(3)] == [[], [0.5], [None]]
    with pytest.raises(ValueError, match=r"000003\.parquet: column 'clip' is string, but double in the corpus's first shard"):
        corpus.read(3, columns=("clip",))


def test_keys_that_need_their_shards_number(corpus: Corpus) -> None:
    edit_manifest(corpus, qualified_keys=True)
    assert Corpus.open(corpus.path).read(1, columns=("width", "key")).column("key")[3].as_py() == "000001/0000010003"
