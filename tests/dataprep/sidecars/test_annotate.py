"""Columns and captions that a finished corpus gets later: what plans, loaders and verification see of them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep.checks.verify import verify
from dataprep.index_tars import index
from dataprep.prepare import PrepareConfig, prepare
from dataprep.sidecars.annotate import annotate
from dataprep.sidecars.writer import remove_sidecar
from pipeline.corpus.corpus import Corpus
from pipeline.loading.loader import Loader
from pipeline.planning.config import PlanConfig
from pipeline.planning.planner import Planner
from pipeline.streams.corpus_view import CorpusView
from tests import REPOSITORY
from tests.dataprep.helpers import digests, photo, write_folder

COUNT = 24


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in three shards, with two captions and a url each, and one more that was rejected."""
    files = {f"{number:03d}.jpg": photo(number) for number in range(COUNT)}
    rows: list[dict[str, Any]] = [
        {"file_name": name, "text": f"old {name}", "captions": [f"older {name}"], "url": f"http://x/{name}", "license": "unknown"}
        for name in files
    ]
    folder = write_folder(tmp_path_factory.mktemp("source") / "set", files, rows=[*rows, {"file_name": "none.jpg", "text": "missing"}])
    config = PrepareConfig.model_validate({"shards": {"max_samples": 8}})
    out = tmp_path_factory.mktemp("prepared") / "C"
    prepare([str(folder)], out=out, config=config)
    return out


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "C"))


def read(corpus: Path, *columns: str) -> list[dict[str, Any]]:
    opened = Corpus.open(corpus)
    return [row for shard in range(len(opened.shards)) for row in opened.read(shard, columns=columns).to_pylist()]


def write_table(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
    pq.write_table(table, path)
    return path


def planner(corpus: Path, **source: Any) -> Planner:
    plan = PlanConfig(stride=8, max_tokens=64, tokens_per_pack=128, packs_per_step=4, window=8)
    opened = CorpusView(Corpus.open(corpus), **source)
    return Planner([opened], plan=plan, seed=0, width=64, diffusion_share=0.5, consistency_share=0.0)


def captions_read(corpus: Path, *, steps: int = 40) -> Counter[str]:
    """What a loader gives out, by caption."""
    loader = Loader(planner(corpus), seed=0, channels=3, factor=8, workers=0)
    seen: Counter[str] = Counter()
    for step, loaded in zip(range(steps), loader, strict=False):
        assert step == loaded.index
        seen.update(caption for batch in loaded.batches for caption in batch.captions)
    assert loader.samples_failed == 0
    return seen


@pytest.mark.parametrize("on", ["key", "sha256", "url"])
def test_columns_are_joined_and_nothing_that_was_there_changes(corpus: Path, tmp_path: Path, on: str) -> None:
    before = digests(corpus)
    rows = read(corpus, "key", "sha256", "url")
    said = [{on: row[on], "aesthetic": 5 + place / 10, "license": "cc0"} for place, row in enumerate(rows[:10])]
    table = write_table(tmp_path / "More scores.parquet", [*reversed(said), {on: "nobody", "aesthetic": 1.0, "license": "x"}])
    done = annotate(corpus, table=table, on=on)  # pyright: ignore[reportArgumentType]
    assert (done.sidecar, done.rows, done.samples, done.matched, done.columns) == ("more-scores", 11, COUNT, 10, ("aesthetic", "license"))
    assert {name: digest for name, digest in digests(corpus).items() if name in before} == before
    found = read(corpus, "key", "aesthetic", "license", "width")
    assert [row["aesthetic"] for row in found] == [5 + place / 10 for place in range(10)] + [None] * (COUNT - 10)
    assert [row["license"] for row in found] == ["cc0"] * 10 + ["unknown"] * (COUNT - 10)  # what it does not name keeps what it had
    assert verify(corpus).problems == []


def test_plans_see_the_columns_and_never_what_is_taken_down(corpus: Path, tmp_path: Path) -> None:
    rows = read(corpus, "key", "url")
    table = write_table(tmp_path / "scores.parquet", [{"key": row["key"], "score": place} for place, row in enumerate(rows)])
    annotate(corpus, table=table, on="key")
    assert planner(corpus, where="score >= 20").sample_counts["samples"] == 4
    before = planner(corpus, where="score >= 20").plan_hash
    urls = write_table(tmp_path / "requests.parquet", [{"url": row["url"]} for row in rows[:6]] * 2)
    done = annotate(corpus, table=urls, on="url", mark="takedown")
    assert (done.matched, done.columns) == (6, ("takedown",))
    counts = planner(corpus).sample_counts
    assert (counts["samples"], counts["left_out"]) == (COUNT - 6, {"takedown": 6})
    step_ids = {id for _ in range(8) for id in planner(corpus).next_step().ids}
    assert step_ids.isdisjoint(f"set/{row['key']}" for row in rows[:6])
    assert planner(corpus, where="score >= 20").plan_hash != before
    with pytest.raises(ValueError, match="did you mean score"):
        planner(corpus, where="scor > 1")


@pytest.mark.parametrize("how", ["first", "last", "only"])
def test_new_captions_are_trained_on(corpus: Path, tmp_path: Path, how: Any) -> None:
    rows = read(corpus, "key", "caption", "captions")
    said = [{"key": row["key"], "caption": f"  new {row['caption']}", "captions": ["newer ☕", row["caption"]]} for row in rows[:12]]
    annotate(corpus, table=write_table(tmp_path / "recaption.parquet", said), on="key", captions=how)
    found = read(corpus, "key", "caption", "captions")
    for row, old in zip(found, rows, strict=True):
        new = [f"new {old['caption']}", "newer ☕", old["caption"]]
        merged = {"first": [*new, old["captions"][1]], "last": [*old["captions"], *new[:2]], "only": new}[how]
        assert row["captions"] == (merged if row["key"] in {each["key"] for each in said} else old["captions"])
        assert row["caption"] == row["captions"][0]
    seen = captions_read(corpus)
    assert set(seen) == {caption for row in found for caption in row["captions"]}
    assert verify(corpus).problems == []
    remove_sidecar(corpus, name="recaption")
    assert set(captions_read(corpus)) == {caption for row in rows for caption in row["captions"]}
    assert read(corpus, "key", "caption", "captions") == rows
    assert verify(corpus).problems == []


def test_the_last_word_counts_and_an_earlier_one_is_replaced(corpus: Path, tmp_path: Path) -> None:
    key = read(corpus, "key")[0]["key"]
    for name, text in (("a", "by a"), ("b", "by b"), ("a", "by a again")):
        annotate(corpus, table=write_table(tmp_path / f"{name}.parquet", [{"key": key, "caption": text}]), on="key", captions="only")
        assert read(corpus, "caption")[0]["caption"] == text
        assert text in captions_read(corpus)
    assert [entry["name"] for entry in json.loads((corpus / "sidecars.json").read_text())["sidecars"]] == ["b", "a"]
    annotate(corpus, table=write_table(tmp_path / "s.parquet", [{"key": key, "s": 1}]), on="key")
    with pytest.raises(ValueError, match=r"its sidecar 's' has a column s: to replace it, give name=s"):
        annotate(corpus, table=write_table(tmp_path / "t.parquet", [{"key": key, "s": 2}]), on="key")


def test_features_of_the_old_captions_are_refused(corpus: Path, tmp_path: Path) -> None:
    before = [shard.digest for shard in Corpus.open(corpus).shards]
    key = read(corpus, "key")[0]["key"]
    annotate(corpus, table=write_table(tmp_path / "s.parquet", [{"key": key, "score": 1}]), on="key")
    assert [shard.digest for shard in Corpus.open(corpus).shards] == before
    annotate(corpus, table=write_table(tmp_path / "c.parquet", [{"key": key, "caption": "new"}]), on="key")
    assert not set(before) & {shard.digest for shard in Corpus.open(corpus).shards}


def test_an_index_of_foreign_tars_is_annotated_too(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    index([str(corpus / "*.tar")], out=out)
    rows = read(out, "key", "url")
    table = write_table(tmp_path / "r.parquet", [{"key": rows[3]["key"], "caption": "seen anew"}])
    annotate(out, table=table, on="key", captions="only")
    assert read(out, "caption")[3]["caption"] == "seen anew"
    assert captions_read(out)["seen anew"]
    assert verify(out).problems == []


def test_sidecars_that_lack_a_new_shard_are_made_again_one_by_one(corpus: Path, tmp_path: Path) -> None:
    """A corpus that has grown: plans refuse it until each of its sidecars speaks of all shards."""
    rows = read(corpus, "key", "caption")
    tables = [
        write_table(tmp_path / f"{name}.parquet", [{"key": row["key"], "caption": f"{name} {row['key']}"} for row in rows]) for name in "ab"
    ]
    for table in tables:
        annotate(corpus, table=table, on="key", captions="only")
    listed = json.loads((corpus / "sidecars.json").read_text())
    for sidecar in listed["sidecars"]:
        del sidecar["shards"]["000002.parquet"]
    (corpus / "sidecars.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"has nothing for 000002\.parquet: run the command that made the sidecar again"):
        Corpus.open(corpus)
    for table in tables:
        annotate(corpus, table=table, on="key", captions="only")
    assert [row["caption"] for row in read(corpus, "caption")] == [f"b {row['key']}" for row in rows]


@pytest.mark.parametrize(
    ("rows", "on", "options", "wrong"),
    [
        ([{"url": "a", "x": 1}], "key", {}, "has no column 'key' to join on"),
        ([{"key": "a", "x": 1}], "key", {}, "none of its 1 values of key"),
        ([{"key": "a"}], "key", {}, "has no column besides 'key'"),
        ([{"key": "a", "width": 1}], "key", {}, "column 'width' is reserved"),
        ([{"key": "a", "x": {"y": 1}}], "key", {}, "column 'x' is struct"),
        ([{"key": "a", "takedown": "yes"}], "key", {}, "must hold booleans"),
        ([{"key": "a", "license": 3}], "key", {}, "in corpus .* it is string: rename it"),
        ([{"key": "a", "x": 1}, {"key": "a", "x": 2}], "key", {}, "two rows of key a differ"),
        ([{"key": "a", "x": 1}], "key", {"name": "../x"}, "is not a name for a sidecar"),
    ],
)
def test_tables_that_cannot_be_used_leave_the_corpus_alone(
    corpus: Path, tmp_path: Path, rows: list[dict[str, Any]], on: Any, options: dict[str, Any], wrong: str
) -> None:
    before = digests(corpus)
    with pytest.raises((ValueError, RuntimeError), match=rf"^[^\n]*{wrong}[^\n]*$"):
        annotate(corpus, table=write_table(tmp_path / "t.parquet", rows), on=on, **options)
    assert digests(corpus) == before


def test_damage_is_found_and_stale_tables_are_not_read(corpus: Path, tmp_path: Path) -> None:
    rows = read(corpus, "key")
    annotate(corpus, table=write_table(tmp_path / "s.parquet", [{"key": rows[0]["key"], "s": 1}]), on="key")
    table = corpus / "000001.s.parquet"
    good = table.read_bytes()
    table.write_bytes((corpus / "000002.s.parquet").read_bytes())
    assert any("000001.s.parquet: its digest" in problem for problem in verify(corpus).problems)
    with pytest.raises(ValueError, match=r"000001\.s\.parquet has other samples"):
        read(corpus, "s")
    table.unlink()
    assert any("000001.s.parquet: is missing" in problem for problem in verify(corpus).problems)
    table.write_bytes(good)
    listed = json.loads((corpus / "sidecars.json").read_text())
    del listed["sidecars"][0]["shards"]["000002.parquet"]
    (corpus / "sidecars.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"sidecar 's' has nothing for 000002\.parquet"):
        read(corpus, "s")
    assert len(read(corpus, "caption")) == COUNT  # what does not need it goes on


def test_killed_it_goes_on_where_it_was(corpus: Path, tmp_path: Path) -> None:
    rows = read(corpus, "key")
    table = write_table(tmp_path / "s.parquet", [{"key": row["key"], "s": place, "caption": f"c{place}"} for place, row in enumerate(rows)])
    command = f"""
import os, signal
from pathlib import Path
import dataprep.shards.store as store
from dataprep.sidecars.annotate import annotate
publish = store.publish
def dying(path):
    if path.name == "000002.s.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(path)
store.publish = dying
annotate({str(corpus)!r}, table=Path({str(table)!r}), on="key")
"""
    process = subprocess.run([sys.executable, "-c", command], cwd=REPOSITORY, env=os.environ, check=False)
    assert process.returncode == -signal.SIGKILL
    assert not (corpus / "sidecars.json").exists()
    assert read(corpus, "caption")[0]["caption"].startswith("old")  # half a sidecar is none
    first = (corpus / "000000.s.parquet").stat().st_mtime_ns
    annotate(corpus, table=table, on="key")
    assert (corpus / "000000.s.parquet").stat().st_mtime_ns == first
    assert [row["s"] for row in read(corpus, "s")] == list(range(COUNT))
    assert verify(corpus).problems == []
    assert not (corpus / ".work").exists()


TEXT_ROWS = [
    {"rank": 7, "score": 0.5, "good": True, "caption": "7, new", "code": "007"},
    {"rank": None, "score": 2.0, "good": False, "caption": 'say "two"\nlines', "code": "x"},
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_text_tables_say_what_parquet_says(corpus: Path, tmp_path: Path, kind: str) -> None:
    keys = [row["key"] for row in read(corpus, "key")]
    rows = [{"key": key, **row} for key, row in zip(keys, TEXT_ROWS, strict=False)]
    rows.append({"key": "no such key", **TEXT_ROWS[0]})
    file = tmp_path / f"t.{kind}"
    if kind == "parquet":
        write_table(file, rows)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    done = annotate(corpus, table=file, on="key")
    assert (done.rows, done.matched, done.unmatched, done.unmatched_examples, done.damaged) == (3, 2, 1, ("no such key",), 0)
    types = {name: Corpus.open(corpus).schema.field(name).type for name in ("rank", "score", "good", "code")}
    assert types == {"rank": pa.int64(), "score": pa.float64(), "good": pa.bool_(), "code": pa.string()}
    found = read(corpus, "rank", "score", "good", "code", "caption")[:3]
    assert found[0] == {**TEXT_ROWS[0]}
    assert found[1] == {**TEXT_ROWS[1], "caption": 'say "two" lines'}
    assert (found[2]["rank"], found[2]["code"], found[2]["caption"][:4]) == (None, None, "old ")
    assert verify(corpus).problems == []


def test_rows_that_name_nothing_are_counted_and_named(corpus: Path, tmp_path: Path) -> None:
    keys = [row["key"] for row in read(corpus, "key")]
    file = tmp_path / "requests.jsonl"
    lines = [json.dumps({"key": key}) for key in (keys[0], *"dcba", "")] + ["{broken"]
    file.write_text("\n".join(lines))
    done = annotate(corpus, table=file, on="key", mark="takedown")
    assert (done.matched, done.unmatched, done.unmatched_examples, done.damaged) == (1, 4, ("a", "b", "c"), 2)
    assert any("not JSON" in example for example in done.damaged_examples)
    before = digests(corpus)
    (tmp_path / "none.csv").write_text("key\nx\ny\nz\nw\n")
    with pytest.raises(RuntimeError, match=r"none of its 4 values of key \(w, x, y, …\) is in corpus"):
        annotate(corpus, table=tmp_path / "none.csv", on="key", mark="takedown")
    assert digests(corpus) == before


def test_takedown_marks_of_several_tables_add_up(corpus: Path, tmp_path: Path) -> None:
    keys = [row["key"] for row in read(corpus, "key")]
    for name, key in (("january", keys[0]), ("february", keys[1]), ("january", keys[2])):
        (tmp_path / f"{name}.csv").write_text(f"key\n{key}\n")
        annotate(corpus, table=tmp_path / f"{name}.csv", on="key", mark="takedown")
    marked = [row["key"] for row in read(corpus, "key", "takedown") if row["takedown"]]
    assert marked == keys[:3]
    assert verify(corpus).problems == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("name,x\na,1\n", "has no column 'key'"),
        ("", "has no readable rows"),
        ("key,takedown\na,perhaps\n", "must hold booleans"),
        ("key,captions\na,one\n", "must hold lists of texts"),
    ],
)
def test_text_tables_that_cannot_be_used(corpus: Path, tmp_path: Path, text: str, wrong: str) -> None:
    before = digests(corpus)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"^[^\n]*{wrong}[^\n]*$"):
        annotate(corpus, table=tmp_path / "t.csv", on="key")
    assert digests(corpus) == before
