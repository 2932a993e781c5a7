"""`tim index`: a corpus over tars that stay where they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from dataprep.checks.verify import verify
from dataprep.index_tars import IndexedShard, IndexTask, _keys_may_repeat, finished, index, index_shard
from dataprep.prepare import PrepareConfig, prepare
from dataprep.shards.writer import ShardEntry
from pipeline.corpus.corpus import Corpus
from pipeline.loading.loader import Loader
from pipeline.planning.planner import PlanConfig, Planner
from tests.dataprep.helpers import digests, photo, photo_folder, write_tar


def tar(path: Path, *, keys: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, [member for key in keys for member in ((f"{key}.jpg", photo(len(key))), (f"{key}.txt", key.encode()))])


def planner(corpus: Corpus) -> Planner:
    plan = PlanConfig(stride=8, max_tokens=36, tokens_per_pack=144, packs_per_step=4)
    return Planner([corpus], plan=plan, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1)


def test_an_index_of_prepared_shards_plans_and_reads_as_they_do(tmp_path: Path) -> None:
    """Without their tables: the tars lie alone in another folder."""
    prepare(
        [str(photo_folder(tmp_path / "photos", count=12))],
        out=tmp_path / "P",
        config=PrepareConfig.model_validate({"shards": {"max_samples": 5}}),
    )
    (tmp_path / "tars").mkdir()
    for path in (tmp_path / "P").glob("*.tar"):
        path.rename(tmp_path / "tars" / path.name)
        path.symlink_to(tmp_path / "tars" / path.name)
    before = digests(tmp_path / "tars")
    counts = index([str(tmp_path / "tars" / "{000000..000002}.tar")], out=tmp_path / "I", workers=1)
    assert (counts.inputs, counts.kept, counts.rejected, counts.notes, counts.shards) == (12, 12, {}, [], 3)
    assert digests(tmp_path / "tars") == before
    assert sorted(path.name for path in (tmp_path / "I").iterdir()) == sorted(
        ["manifest.json", *(f"00000{n}{end}" for n in range(3) for end in (".parquet", "_stats.json"))]
    )
    prepared, indexed = Corpus.open(tmp_path / "P"), Corpus.open(tmp_path / "I", name="photos")
    assert (indexed.count, prepared.name, Corpus.open(tmp_path / "I").name) == (12, "photos", "tars")
    for one, other in zip(
        *(islice(iter(Loader(planner(corpus), seed=5, channels=3, factor=1, workers=0)), 3) for corpus in (prepared, indexed)), strict=True
    ):
        assert one.ids == other.ids
        for batch, same in zip(one.batches, other.batches, strict=True):
            assert batch.captions == same.captions
            assert all(bool((left == right).all()) for left, right in zip(batch.images, same.images, strict=True))
    assert verify(tmp_path / "I").problems == []

    damaged = tmp_path / "tars" / "000001.tar"
    data = bytearray(damaged.read_bytes())
    row = indexed.read(1, columns=("key", "image_offset", "image_length")).to_pylist()[2]
    end, scan = row["image_offset"] + row["image_length"], row["image_length"] // 4  # the header stays as it was
    data[end - scan : end] = bytes(scan)
    damaged.write_bytes(data)
    (problem,) = verify(tmp_path / "I").problems
    assert f"{damaged}: {row['key']}: its image cannot be read: damaged" in problem
    damaged.write_bytes(data[:-2000])
    (problem,) = verify(tmp_path / "I").problems
    assert f"{damaged}: does not match 000001.parquet" in problem


def test_a_run_that_was_killed_goes_on_and_a_corpus_grows(tmp_path: Path) -> None:
    """A pipe in a tar's place holds the first run until it is killed."""
    tars = [tar(tmp_path / "t" / f"{n}.tar", keys=[f"{n}{i}" for i in range(3)]) for n in range(3)]
    tars[2].rename(tmp_path / "third")
    os.mkfifo(tars[2])
    out, command = tmp_path / "C", [sys.executable, "-m", "launch.cli", "index", str(tmp_path / "t" / "{0..2}.tar"), "--workers", "1"]
    run = subprocess.Popen([*command, "--out", str(out)], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (out / "000001_stats.json").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (out / "manifest.json").exists()
    tars[2].unlink()
    (tmp_path / "third").rename(tars[2])
    inodes = {path.name: path.stat().st_ino for path in out.glob("00000[01]*")}
    assert len(inodes) == 4

    told: list[tuple[int, int | None]] = []
    counts = index(
        [str(path) for path in tars[:2]] + [str(tars[2])], out=out, progress=lambda stage, done, total, note="": told.append((done, total))
    )
    assert (counts.kept, told) == (9, [(2, 3), (3, 3)])
    assert {path.name: path.stat().st_ino for path in out.glob("00000[01]*")} == inodes
    files = digests(out)

    more = tar(tmp_path / "t" / "3.tar", keys=["30"])
    assert index([str(tmp_path / "t" / "{0..3}.tar")], out=out).kept == 10
    assert {path.name: path.stat().st_ino for path in out.glob("00000[01]*")} == inodes
    more.unlink()
    index([str(path) for path in tars], out=out)
    assert digests(out) == files


def test_tars_that_cannot_be_read_are_in_the_account(shared: Path, tmp_path: Path) -> None:
    hostile = shared / "corpora/hostile"
    good = tar(tmp_path / "a.tar", keys=["x", "yy"])
    specs = [str(tmp_path / "{a,b}.tar"), *(str(path) for path in sorted(hostile.glob("*.tar")))]
    counts = index(specs, out=tmp_path / "C")
    assert counts.inputs == counts.kept + sum(counts.rejected.values())
    assert counts.rejected["missing"] >= 1
    for path, why in (
        (tmp_path / "b.tar", "missing: there is no such tar"),
        (hostile / "not_a_tar.tar", "bad-record: not_a_tar.tar: not a tar"),
    ):
        assert any(note.startswith(f"{path}: {why}") for note in counts.notes)
    corpus = Corpus.open(tmp_path / "C")
    assert corpus.shards[0].path == str(good)
    assert (corpus.shards[0].count, corpus.shards[1].count) == (2, 0)
    assert sum(len(corpus.read(shard, columns=("key",))) for shard in range(len(corpus.shards))) == counts.kept == corpus.count
    planner(corpus).next_step()
    assert not [path for path in tmp_path.rglob("*") if path.name in ("passwd", "escaped")]


def test_what_cannot_be_indexed(tmp_path: Path) -> None:
    good = str(tar(tmp_path / "a.tar", keys=["x"]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").write_text('{"format": 1}')
    (tmp_path / "b.tgz").touch()
    (tmp_path / "nothing.tar").touch()
    write_tar(tmp_path / "empty.tar", [])
    out = tmp_path / "C"
    for specs, where, said in (
        ([], out, "no shards"),
        ([str(tmp_path / "{0..9}.tar")], out, "no file matches"),
        ([str(tmp_path / "b.tgz")], out, "not a .tar"),
        ([good, good], out, "named twice"),
        ([good], tmp_path / "mine", "thesis.txt"),
        ([good], tmp_path / "prepared", "`tim prepare` made"),
        ([good], tmp_path / "b.tgz", "is a file"),
    ):
        with pytest.raises(ValueError, match=said):
            index(specs, out=where)
    with pytest.raises(RuntimeError, match=r"no usable sample in 2 tar\(s\) \(bad-record 1\)"):
        index([str(tmp_path / "empty.tar"), str(tmp_path / "nothing.tar")], out=out)
    assert not out.exists()


def test_a_shard_at_a_url_and_its_table_beside_it(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    data = tar(tmp_path / "a.tar", keys=["x", "yy"]).read_bytes()
    files.pipe("/bucket/a.tar", data)
    task = IndexTask(number=7, tar="memory://bucket/a.tar", out=tmp_path)
    done = index_shard(task, lambda offset: None)
    assert (done.shard.name, done.shard.bytes, done.shard.count, done.first_key, done.last_key) == (task.tar, len(data), 2, "x", "yy")
    assert finished(tmp_path, number=7, tar=task.tar) == done
    assert pq.read_table(tmp_path / "000007.parquet").column("caption").to_pylist() == ["x", "yy"]
    gone = index_shard(IndexTask(number=8, tar="memory://bucket/b.tar", out=tmp_path), lambda offset: None)
    assert (gone.rejected, gone.shard.count) == ({"missing": 1}, 0)
    assert finished(tmp_path, number=8, tar="memory://bucket/b.tar") is None


def test_keys_that_may_repeat_get_their_tars_number(tmp_path: Path) -> None:
    shards = [str(tar(tmp_path / name / "0.tar", keys=["a", "bb"])) for name in ("x", "y")]
    counts = index(shards, out=tmp_path / "C")
    assert any(note.startswith("keys of different tars may be equal") for note in counts.notes)
    corpus = Corpus.open(tmp_path / "C")
    assert counts.kept == len({id for _ in range(2) for id in planner(corpus).next_step().ids}) == 4

    def shard(first: str, last: str, count: int = 2) -> IndexedShard:
        entry = ShardEntry(name="", count=count, bytes=0, sha256=None, table="", table_sha256="", table_bytes=0, rows=0)
        return IndexedShard(shard=entry, rejected={}, first_key=first, last_key=last, notes=[])

    assert not _keys_may_repeat([shard("c", "d"), shard("", "", 0), shard("a", "b")])
    assert _keys_may_repeat([shard("c", "d"), shard("a", "c")])
