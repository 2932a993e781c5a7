"""A corpus that grows: new inputs, second looks, and what a kill leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataprep.checks.repair import repair
from dataprep.checks.verify import verify
from dataprep.job import with_own_settings
from dataprep.prepare import AppendMode, PrepareConfig, prepare
from dataprep.sidecars.annotate import annotate
from pipeline.corpus.corpus import Corpus
from pipeline.planning.config import PlanConfig
from pipeline.size_rule import LEFT_OUT_REASONS
from pipeline.streams.corpus_view import CorpusView
from tests import REPOSITORY
from tests.dataprep.helpers import digests, member, photo, photo_folder, row_of, table_rows, write_folder

CONFIG = PrepareConfig.model_validate({"shards": {"max_samples": 4}})
APPEND, RETRY = AppendMode(append=True, retry=False), AppendMode(append=False, retry=True)


def test_new_inputs_come_in_new_shards_and_are_compared_with_the_old(tmp_path: Path) -> None:
    out = tmp_path / "C"
    first = photo_folder(tmp_path / "f", count=6)
    (first / "00005.jpg").write_bytes(photo(5, height=400, width=480))
    rows = [{"file_name": f"{number:05d}.jpg", "text": f"image {number}", "score": number} for number in range(6)]
    write_folder(first, {}, rows=rows)
    before = prepare([str(first)], out=out, config=CONFIG)
    old = {name: digest for name, digest in digests(out).items() if name.startswith("00000")}

    rows += [{"file_name": f"{number:05d}.jpg", "text": f"image {number}", "score": number} for number in (8, 9)]
    rows += [{"file_name": "same.jpg", "text": "again", "score": 0}, {"file_name": "near.jpg", "text": "near", "score": 1}]
    rows += [{"file_name": "bare.jpg", "text": "no score", "licence": "free"}]
    new = {"00008.jpg": photo(8), "00009.jpg": photo(9), "same.jpg": photo(3), "near.jpg": photo(5, height=200, width=240, quality=60)}
    write_folder(first, {**new, "bare.jpg": photo(10)}, rows=rows)
    files = {f"{number}.jpg": photo(number) for number in (20, 21, 22)}
    other = write_folder(tmp_path / "g", files, rows=[{"file_name": name, "text": name, "score": 7} for name in files])
    for folder in (first, other):
        counts = prepare([str(folder)], out=out, config=CONFIG, append_mode=APPEND)
        assert verify(out).problems == []
    assert (counts.inputs, counts.kept, counts.rejected) == (14, 12, {"bad-record": 1, "duplicate": 1})
    assert {name: digest for name, digest in digests(out).items() if name in old} == old
    assert counts.inputs == counts.kept + sum(counts.rejected.values()) == len(table_rows(out))
    assert before.kept == 6
    assert "f: 6 input(s) are in the corpus already" in counts.notes
    assert row_of(out, "same.jpg")["duplicate_of"] == row_of(out, "00003.jpg")["key"]
    assert row_of(out, "same.jpg")["detail"] == f"same bytes as {row_of(out, '00003.jpg')['key']}"
    assert row_of(out, "near.jpg")["near_duplicate_of"] == row_of(out, "00005.jpg")["key"]
    assert row_of(out, "bare.jpg")["detail"] == "score is null, where every sample of the corpus has a value of type int64"
    assert {type(json.loads(member(out, row, "json"))["score"]) for row in table_rows(out) if row["key"]} == {int}
    assert any("licence" in note for note in counts.notes)
    keys = [row["key"] for row in table_rows(out) if row["key"]]
    assert len(set(keys)) == len(keys) == counts.kept

    finished = digests(out)
    again = prepare([str(first)], out=out, config=CONFIG, append_mode=APPEND)
    assert (again.inputs, again.kept) == (counts.inputs, counts.kept)
    assert again.notes[-1].startswith("nothing was added: of 0 inputs")
    assert digests(out) == finished


def test_rejected_inputs_get_a_second_look(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=5)
    out = tmp_path / "C"
    whole = {name: (folder / name).read_bytes() for name in ("00001.jpg", "00003.jpg")}
    (folder / "00001.jpg").unlink()
    (folder / "00003.jpg").write_bytes(whole["00003.jpg"][:200])
    (folder / "00004.jpg").write_bytes(photo(4, height=8, width=9))
    counts = prepare([str(folder)], out=out, config=CONFIG)
    assert counts.rejected == {"missing": 1, "too-small": 1, "damaged": 1}

    for name, kept, rejected in (("00003.jpg", 3, {"missing": 1, "too-small": 1}), ("00001.jpg", 4, {"too-small": 1})):
        (folder / name).write_bytes(whole[name])
        (folder / "new.jpg").write_bytes(photo(30))
        metadata = (folder / "metadata.jsonl").read_text()
        if "new.jpg" not in metadata:
            (folder / "metadata.jsonl").write_text(metadata + '{"file_name": "new.jpg", "text": "new"}\n')
        counts = prepare([str(folder)], out=out, config=CONFIG, append_mode=RETRY)
        assert (counts.inputs, counts.kept, counts.rejected) == (5, kept, rejected)
        assert "f: 1 input(s) are new: append mode takes them" in counts.notes
        assert verify(out).problems == []
    assert [row["reason"] for row in table_rows(out) if row["path"] == "00001.jpg"] == ["missing", "missing", ""]
    counts = prepare([str(folder)], out=out, config=CONFIG, append_mode=RETRY)
    assert counts.kept == 4
    counts = prepare([str(folder)], out=out, config=CONFIG, append_mode=AppendMode(append=True, retry=True))
    assert (counts.inputs, counts.kept) == (6, 5)


def test_what_cannot_grow_is_refused(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=3)
    out = tmp_path / "C"
    with pytest.raises(ValueError, match="not a corpus"):
        prepare([str(folder)], out=out, config=CONFIG, append_mode=APPEND)
    prepare([str(folder)], out=out, config=CONFIG)
    problem = r"another shards\.max_samples \(4 there, 10000 here\); inputs are added with the corpus's own settings"
    with pytest.raises(ValueError, match=problem):
        prepare([str(folder)], out=out, config=PrepareConfig(), append_mode=APPEND)
    other = PrepareConfig.model_validate({"seed": 3, "filters": {"min_side": 20}, "shards": {"max_samples": 4}})
    with pytest.raises(ValueError, match=r"another filters\.min_side \(16 there, 20 here\), seed \(0 there, 3 here\); inputs are added"):
        prepare([str(folder)], out=out, config=other, append_mode=APPEND)
    given = PrepareConfig.model_validate({"sources": {"f": {"tags": ["new"]}}})
    own = with_own_settings(out, given=given)
    assert own.shards == CONFIG.shards
    assert own.sources == given.sources
    assert prepare([f"f={folder}"], out=out, config=own, append_mode=APPEND).kept == 3
    with pytest.raises(ValueError, match=r"another seed \(0 there, 1 here\)"):
        prepare([str(folder)], out=out, config=with_own_settings(out, given=PrepareConfig(seed=1)), append_mode=APPEND)
    with pytest.raises(ValueError, match=r"another sources \(g is not in it, f is in it, too\); append to it"):
        prepare([str(photo_folder(tmp_path / "g", count=2))], out=out, config=CONFIG)


# What the process does that adds to a corpus: it is killed as soon as this file has taken its place.
ADDITION = """
import os, signal, sys
from dataprep.sidecars.annotate import annotate
from dataprep.job import with_own_settings
from dataprep.prepare import AppendMode, PrepareConfig, prepare

def replace_and_die(source, target, replace=os.replace):
    replace(source, target)
    if os.path.basename(target) == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_and_die
config = PrepareConfig.model_validate_json(sys.stdin.read())
prepare([sys.argv[1]], out=sys.argv[2], config=config, append_mode=AppendMode(append=True, retry=False))
"""


@pytest.mark.parametrize("moment", ["chunk-000000.arrow", "000002_stats.json", "README.md", "index.parquet", "manifest.json"])
def test_a_kill_leaves_the_old_corpus_or_the_new_one(tmp_path: Path, moment: str) -> None:
    old, new = photo_folder(tmp_path / "f", count=6), photo_folder(tmp_path / "g", count=14, first=50)
    out, unbroken = tmp_path / "C", tmp_path / "D"
    prepare([str(old)], out=out, config=CONFIG)
    shutil.copytree(out, unbroken)
    expected = prepare([str(new)], out=unbroken, config=CONFIG, append_mode=APPEND)
    command = [sys.executable, "-c", ADDITION, str(new), str(out), moment]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(CONFIG.model_dump_json().encode())
        process.stdin.close()
        while process.poll() is None and not (moment.endswith("_stats.json") and (out / moment).exists()):  # shards are others' work
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    is_old = moment != "manifest.json"
    corpus = Corpus.open(out)
    assert corpus.count == (6 if is_old else 20)
    assert sum(corpus.read(shard, columns=["key"]).num_rows for shard in range(len(corpus.shards))) == corpus.count
    unfinished = [".work: an append is unfinished: run its command again; its shards were not checked"]
    assert verify(out).problems == (unfinished if is_old else [])
    with pytest.raises(ValueError, match=r"a preparation is unfinished: run its command again, or delete .*\.work"):
        repair(out)
    if is_old:
        with pytest.raises(ValueError, match=r"an unfinished append has another sources"):
            prepare([str(photo_folder(tmp_path / "h", count=2, first=200))], out=out, config=CONFIG, append_mode=APPEND)
        assert prepare([str(old)], out=out, config=CONFIG).kept == 6
    counts = prepare([str(new)], out=out, config=CONFIG, append_mode=APPEND)
    assert counts.kept == expected.kept
    assert digests(out) == digests(unbroken)


def test_shards_of_an_addition_that_was_given_up_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    out = tmp_path / "C"
    prepare([str(photo_folder(tmp_path / "f", count=3))], out=out, config=CONFIG)
    shutil.copytree(out, tmp_path / "D")
    prepare([str(photo_folder(tmp_path / "g", count=5, first=10))], out=tmp_path / "D", config=CONFIG, append_mode=APPEND)
    for name in ("000001.tar", "000001.parquet", "000001_stats.json", "000002.tar"):
        shutil.copy(tmp_path / "D" / name, out)
    prepare([str(photo_folder(tmp_path / "h", count=2, first=20))], out=out, config=CONFIG, append_mode=APPEND)
    assert verify(out).problems == []
    assert sorted(row["source"] for row in table_rows(out)) == ["f", "f", "f", "h", "h"]


def test_sidecars_of_a_corpus_that_grows_say_nothing_of_new_samples_until_they_are_made_again(tmp_path: Path) -> None:
    out = tmp_path / "C"
    prepare([str(photo_folder(tmp_path / "f", count=6))], out=out, config=CONFIG)
    keys = [row["key"] for row in table_rows(out)]
    for name, text in (("scores", "score\n" + "".join(f"{key},0.5\n" for key in keys)), ("captions", f"caption\n{keys[0]},new\n")):
        (tmp_path / f"{name}.csv").write_text(f"key,{text}")
        annotate(out, table=tmp_path / f"{name}.csv", on="key")
    (tmp_path / "gone.csv").write_text(f"key\n{keys[1]}\n")
    annotate(out, table=tmp_path / "gone.csv", on="key", mark="takedown")
    old = digests(out)

    told: list[str] = []
    new = photo_folder(tmp_path / "g", count=5, first=50)
    prepare([str(new)], out=out, config=CONFIG, append_mode=APPEND, announce=told.append)
    assert told[-1].endswith(
        "its sidecars (scores, captions, gone) have no values for the added samples yet: rerun the commands that made them"
    )
    assert verify(out).problems == []
    kept_names = [name for name in old if name[:6].isdigit()]
    assert {name: digests(out)[name] for name in kept_names} == {name: old[name] for name in kept_names}
    corpus = Corpus.open(out)
    rows = [
        row
        for shard in range(len(corpus.shards))
        for row in corpus.read(shard, columns=["key", "score", "captions", "takedown"]).to_pylist()
    ]
    assert [row["score"] for row in rows] == [0.5] * 6 + [None] * 5
    assert rows[0]["captions"] == ["new", next(row["caption"] for row in table_rows(out) if row["key"] == keys[0])]
    assert sorted(row["captions"][0] for row in rows[6:]) == [f"image {number:05d}.jpg" for number in range(50, 55)]
    assert [row["key"] for row in rows if row["takedown"]] == [keys[1]]
    assert "Scores and further numbers" in (out / "report.html").read_text()
    rule = PlanConfig(stride=8, max_tokens=64, tokens_per_pack=128).size_rule
    _, targets = CorpusView(corpus, where="score > 0").select(len(corpus.shards) - 1, rule=rule)
    assert set(targets.left_out.tolist()) == {LEFT_OUT_REASONS.index("where")}

    (tmp_path / "scores.csv").write_text("key,score\n" + "".join(f"{row['key']},0.5\n" for row in rows))
    annotate(out, table=tmp_path / "scores.csv", on="key")
    corpus = Corpus.open(out)
    assert corpus.read(len(corpus.shards) - 1, columns=["score"]).column("score").null_count == 0
    assert verify(out).problems == []


def test_a_broken_sidecar_is_told_before_a_corpus_grows(tmp_path: Path) -> None:
    out = tmp_path / "C"
    prepare([str(photo_folder(tmp_path / "f", count=3))], out=out, config=CONFIG)
    (tmp_path / "s.csv").write_text(f"key,score\n{table_rows(out)[0]['key']},1\n")
    annotate(out, table=tmp_path / "s.csv", on="key")
    (out / "000000.s.parquet").write_bytes(b"no table")
    before = digests(out)
    with pytest.raises(ValueError, match=r"000000\.s\.parquet of its sidecar 's' is damaged.*remove s with .tim annotate"):
        prepare([str(photo_folder(tmp_path / "g", count=2, first=9))], out=out, config=CONFIG, append_mode=APPEND)
    assert {name: digest for name, digest in digests(out).items() if not name.startswith(".work")} == before
