"""The job as a whole: the account, the layout, the same bytes whatever happens on the way, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataprep.checks.verify import verify
from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.rejections import NothingKept
from dataprep.shards.manifest import read_input_counts
from pipeline.corpus.corpus import read_manifest
from pipeline.images import read_image
from tests import REPOSITORY
from tests.dataprep.helpers import digests, member, photo, photo_folder, row_of, start_prepare, table_rows, write_folder, write_tar
from tests.processes import is_running

CONFIG = PrepareConfig()
SMALL_SHARDS = PrepareConfig.model_validate({"shards": {"max_samples": 150}})


def test_every_input_is_in_the_account_and_in_a_table(tmp_path: Path) -> None:
    files = {f"{number}.jpg": photo(number) for number in range(12)} | {
        "cut.jpg": photo(20)[:-99],
        "tiny.png": photo(21, height=8, format="PNG"),
    }
    rows = [{"file_name": name, "text": f"no {name}", "score": 0.5, "tags": ["x", 1]} for name in files]
    rows += [{"file_name": "gone.jpg", "text": "gone", "tags": []}, {"file_name": "0.jpg", "text": "again"}]
    rows[3]["text"] = " "
    folder = write_folder(tmp_path / "mixed", files, rows=rows)
    stages: list[tuple[str, int, int | None]] = []
    counts = prepare([str(folder)], out=tmp_path / "C", config=CONFIG, progress=lambda *step, note="": stages.append(step))
    assert counts.rejected == {"duplicate": 1, "missing": 1, "no-caption": 1, "too-small": 1, "damaged": 1}
    assert counts.inputs == counts.kept + sum(counts.rejected.values()) == len(rows)
    found = table_rows(tmp_path / "C")
    assert sorted(row["path"] for row in found) == sorted(str(row["file_name"]) for row in rows)
    assert all((row["status"] == "success") == (row["reason"] == "") == (row["key"] is not None) for row in found)
    assert {row["tags"] for row in found} == {'["x", 1]', "[]", ""}
    assert [row["detail"] for row in found if row["reason"] == "duplicate"] == ["same bytes as mixed/0.jpg"]
    assert ("write", counts.kept, counts.kept) in stages
    assert stages[-1] == ("report", counts.shards, counts.shards)
    assert verify(tmp_path / "C").problems == []


def test_the_layout_is_the_designs(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "set", count=25)
    out = tmp_path / "C"
    prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"shards": {"max_samples": 10}}))
    stems = ["000000", "000001", "000002"]
    shard_files = [f"{stem}{ending}" for stem in stems for ending in (".parquet", ".tar", "_stats.json")]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*shard_files, "README.md", "index.json", "index.parquet", "manifest.json", "report.html"]
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["format"], manifest["name"]) == (1, "set")
    assert [shard["count"] for shard in manifest["shards"]] == [10, 10, 5]
    wids = json.loads((out / "index.json").read_text())
    assert wids["__kind__"] == "wids-shard-index-v1"
    assert [shard["nsamples"] for shard in wids["shardlist"]] == [10, 10, 5]
    index = pq.ParquetFile(out / "index.parquet")
    assert [index.metadata.row_group(group).num_rows for group in range(3)] == [10, 10, 5]
    assert index.schema_arrow.names[:4] == ["key", "source", "path", "status"]
    for stem in stems:
        with tarfile.open(out / f"{stem}.tar") as tar:
            infos = tar.getmembers()
        assert [info.name.split(".")[1] for info in infos] == ["jpg", "txt", "json"] * (len(infos) // 3)
        assert [info.name[:10] for info in infos[::3]] == [f"{stem}{place:04d}" for place in range(len(infos) // 3)]
        assert all((info.mtime, info.uid, info.gid, info.uname, info.pax_headers) == (0, 0, 0, "", {}) for info in infos)
    order = index.read(["path"]).column("path").to_pylist()
    assert sorted(order) != order  # shuffled
    for row in index.read().to_pylist():
        assert member(out, row, "text").decode() == row["caption"] == f"image {row['path']}"
        assert member(out, row, "image") == (folder / row["path"]).read_bytes()
        record = json.loads(member(out, row, "json"))
        assert {name: record[name] for name in ("key", "url", "caption", "captions", "width", "height", "sha256")} == {
            "key": row["key"],
            "url": row["path"],
            "caption": row["caption"],
            "captions": row["captions"],
            "width": 48,
            "height": 40,
            "sha256": row["sha256"],
        }


def test_sources_of_all_kinds_end_in_samples_of_one_kind(tmp_path: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": "a", "score": 1, "width": 3}, {"file_name": "b.png", "text": "b", "score": 2.5, "ok": True}]
    folder = write_folder(tmp_path / "f", {"a.jpg": photo(1), "b.png": photo(2, format="PNG")}, rows=rows)
    record = {"url": "http://x/c", "caption": "c", "note": None, "source": "crawl", "big": 2**70, "nan": float("nan")}
    tar = write_tar(tmp_path / "t.tar", [("c.jpg", photo(3)), ("c.txt", b"c"), ("c.json", json.dumps(record).encode())])
    out = tmp_path / "C"
    prepare([str(folder), str(tar)], out=out, config=CONFIG)
    records = [json.loads(member(out, row, "json")) for row in table_rows(out)]
    shapes = {tuple((name, type(value)) for name, value in record.items()) for record in records}
    assert len(shapes) == 1
    assert None not in [value for record in records for value in record.values()]
    by_path = {row["path"]: row for row in table_rows(out)}
    assert [by_path[path]["score"] for path in ("a.jpg", "b.png", "t.tar/c.jpg")] == [1.0, 2.5, None]
    assert [by_path[path]["ok"] for path in ("a.jpg", "b.png")] == [None, True]
    assert by_path["t.tar/c.jpg"]["source_source"] == "crawl"
    assert by_path["t.tar/c.jpg"]["big"] == str(2**70)
    assert by_path["t.tar/c.jpg"]["url"] == "http://x/c"
    assert by_path["a.jpg"]["url"] == ""


def test_classes_become_members_if_all_have_one(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.jpg", "label": number % 3} for number in range(6)]
    folder = write_folder(tmp_path / "f", {f"{number}.jpg": photo(number) for number in range(6)}, rows=rows)
    counts = prepare([str(folder)], out=tmp_path / "C", config=CONFIG)
    assert (counts.kept, counts.notes) == (6, [])
    assert all(member(tmp_path / "C", row, "cls") == str(row["label"]).encode() for row in table_rows(tmp_path / "C"))
    assert {(row["caption"], tuple(row["captions"])) for row in table_rows(tmp_path / "C")} == {("", ("",))}
    more = photo_folder(tmp_path / "g", count=2, first=50)
    counts = prepare([str(folder), str(more)], out=tmp_path / "D", config=CONFIG)
    assert counts.notes == ["only 6 of 8 samples have a class, so the shards have no .cls members"]
    assert {row["cls_offset"] for row in table_rows(tmp_path / "D")} == {None}
    assert verify(tmp_path / "C").problems == verify(tmp_path / "D").problems == []


@pytest.mark.parametrize("near", ["mark", "drop", "off"])
def test_near_duplicates(tmp_path: Path, near: str) -> None:
    files = {"small.jpg": photo(1, height=200, width=240, quality=60), "large.jpg": photo(1, height=400, width=480), "other.jpg": photo(2)}
    folder = write_folder(tmp_path / "f", files, rows=[{"file_name": name, "text": name} for name in files])
    out = tmp_path / "C"
    counts = prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"dedup": {"near": near}}))
    assert counts.rejected == ({"near-duplicate": 1} if near == "drop" else {})
    small, large = row_of(out, "small.jpg"), row_of(out, "large.jpg")
    assert small["near_duplicate_of"] == ("" if near == "off" else large["key"])
    assert (small["key"] is None) == (near == "drop")
    assert large["near_duplicate_of"] == row_of(out, "other.jpg")["near_duplicate_of"] == ""


def test_what_is_transparent_lies_on_the_colour_that_was_asked_for(tmp_path: Path) -> None:
    clear = np.dstack([np.random.default_rng(0).integers(0, 256, (40, 48, 3)), np.zeros((40, 48))]).astype(np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    folder = write_folder(
        tmp_path / "f", {"clear.png": (tmp_path / "clear.png").read_bytes()}, rows=[{"file_name": "clear.png", "text": "a"}]
    )
    for background, level in (("white", 255), ("#102030", 0x10)):
        out = tmp_path / background.strip("#")
        prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"images": {"background": background}}))
        assert abs(int(read_image(member(out, row_of(out, "clear.png"), "image")).pixels[20, 20, 0]) - level) <= 2
    for wrong in ("nocolour", "#ff000080"):
        with pytest.raises(ValueError, match="background"):
            PrepareConfig.model_validate({"images": {"background": wrong}})


def test_one_image_format_in_a_corpus(tmp_path: Path) -> None:
    files = {"a.jpg": photo(1), "b.webp": photo(2, format="WEBP"), "c.gif": photo(3, format="GIF")}
    folder = write_folder(tmp_path / "f", files, rows=[{"file_name": name, "text": name} for name in files])
    for format, magic in (("png", b"\x89PNG"), ("webp", b"RIFF"), ("jpg", b"\xff\xd8\xff")):
        out = tmp_path / format
        prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"images": {"format": format}}))
        assert all(member(out, row, "image").startswith(magic) for row in table_rows(out))
        with tarfile.open(out / "000000.tar") as tar:
            assert sum(name.endswith(f".{format}") for name in tar.getnames()) == 3
    assert verify(tmp_path / "png").problems == []


def test_the_byte_limit_closes_shards(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=30)
    config = PrepareConfig.model_validate({"shards": {"max_bytes": 60_000}})
    counts = prepare([str(folder)], out=tmp_path / "C", config=config)
    sizes = [shard["bytes"] for shard in json.loads((tmp_path / "C/manifest.json").read_text())["shards"]]
    assert counts.shards == len(sizes) > 2
    assert all(size <= 60_000 + 10_240 for size in sizes)  # tar rounds its end up to 10 KiB


# ---- the same bytes, however it came about


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than one chunk of inputs, bad ones, PNGs to re-encode and duplicates among them."""
    folder = tmp_path_factory.mktemp("many")
    files: dict[str, bytes] = {}
    for number in range(1300):
        data = photo(number % 1250, format="PNG" if number % 10 == 0 else "JPEG")
        files[f"{number:05d}.jpg"] = data[: len(data) // 2] if number % 97 == 0 else data
    return write_folder(folder, files, rows=[{"file_name": name, "text": f"image {name}"} for name in files])


@pytest.fixture(scope="module")
def reference(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "C"
    counts = prepare([str(many)], out=out, config=SMALL_SHARDS, workers=1)
    assert counts.shards > 5
    assert set(counts.rejected) == {"duplicate", "damaged"}
    return digests(out)


# The reference is written by one worker.
def test_two_workers_write_what_one_writes(many: Path, reference: dict[str, str], tmp_path: Path) -> None:
    prepare([str(many)], out=tmp_path / "C", config=SMALL_SHARDS, workers=2)
    assert digests(tmp_path / "C") == reference


@pytest.mark.parametrize("moment", [".work/chunk-000000.arrow", "000001_stats.json"])
def test_killed_and_called_again_it_ends_the_same(many: Path, reference: dict[str, str], tmp_path: Path, moment: str) -> None:
    out = tmp_path / "C"
    process = start_prepare([many], out=out, config=SMALL_SHARDS, workers=2)
    deadline = time.monotonic() + 120
    while not (out / moment).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task")
    workers = [int(child) for task in children.iterdir() for child in (task / "children").read_text().split()]
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was finished before it could be killed"
    assert workers
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers)), "workers outlived their parent"

    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"unfinished corpus with another shards\.max_samples"):
        prepare([str(many)], out=out, config=CONFIG)
    before = (out / moment).stat().st_mtime_ns
    seen: list[int] = []

    def see(stage: str, done: int, total: int | None, *, note: str = "") -> None:
        if stage == "examine":
            seen.append(done)

    prepare([str(many)], out=out, config=SMALL_SHARDS, progress=see)
    assert digests(out) == reference
    assert not seen or min(seen) >= 1024, "a finished chunk was examined again"
    assert not (out / moment).exists() or (out / moment).stat().st_mtime_ns == before


def test_a_finished_corpus_gives_its_account_at_once(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=3)
    out = tmp_path / "C"
    first = prepare([str(folder)], out=out, config=CONFIG)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([str(folder)], out=out, config=CONFIG) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(ValueError, match=r"^[^\n]*another dedup\.near[^\n]*$"):
        prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"dedup": {"near": "off"}}))
    (folder / "new.jpg").write_bytes(photo(9))
    with pytest.raises(ValueError, match=r"^[^\n]*another sources[^\n]*$"):
        prepare([str(folder)], out=out, config=CONFIG)


def test_copies_of_a_folder_make_the_same_corpus(tmp_path: Path) -> None:
    first = photo_folder(tmp_path / "f", count=5)
    second = tmp_path / "elsewhere/f"
    shutil.copytree(first, second)
    for folder, out in ((first, tmp_path / "C"), (second, tmp_path / "D")):
        prepare([str(folder)], out=out, config=CONFIG)
    assert digests(tmp_path / "C") == digests(tmp_path / "D")


def test_a_decoder_that_takes_its_process_down_costs_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, simplejpeg\n"
        "decode = simplejpeg.decode_jpeg\n"
        "simplejpeg.decode_jpeg = lambda data, **options: os.abort() if data.endswith(b'BOOM') else decode(data, **options)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{REPOSITORY}")
    folder = photo_folder(tmp_path / "f", count=40)
    for name in ("00003.jpg", "00031.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes() + b"BOOM")
    assert start_prepare([folder], out=tmp_path / "C", config=CONFIG, workers=2).wait() == 0
    counts = read_input_counts(read_manifest(tmp_path / "C"))
    assert (counts.kept, counts.rejected) == (38, {"crashed": 2})
    assert row_of(tmp_path / "C", "00031.jpg")["reason"] == "crashed"


# ---- what it refuses


def test_no_usable_image_leaves_nothing_but_an_explanation(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(5)]
    folder = write_folder(
        tmp_path / "f",
        {**dict.fromkeys(names, b"no"), "b.jpg": b"", "unlisted.jpg": b""},
        rows=[*({"file_name": name, "text": "a"} for name in names), {"file_name": "b.jpg"}],
    )
    with pytest.raises(NothingKept, match=r"^no usable image among 6 inputs \(empty 1, not-an-image 5\)[^\n]*$") as failure:
        prepare([str(folder)], out=tmp_path / "C", config=CONFIG)
    assert not (tmp_path / "C").exists()
    data = failure.value.data
    assert (data["inputs"], data["kept"], data["rejected"]) == (6, 0, {"empty": 1, "not-an-image": 5})
    assert [example["path"] for example in data["examples"]["not-an-image"]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert all(example["detail"] for example in data["examples"]["not-an-image"])
    assert any("f/b.jpg" in line for line in failure.value.lines)
    assert "note: f: 1 image(s) not listed by its metadata were left out" in failure.value.lines


def test_where_all_inputs_are_duplicates_of_another_corpus_the_explanation_names_it(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=2)
    prepare([str(folder)], out=tmp_path / "C", config=CONFIG)
    with pytest.raises(NothingKept) as failure:
        prepare([str(folder)], out=tmp_path / "D", config=CONFIG, against=[tmp_path / "C"])
    [first, _] = failure.value.data["examples"]["duplicate"]
    assert first["detail"].startswith("same bytes as f/")
    assert not (tmp_path / "D").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=2)
    out = write_folder(tmp_path / "C", {"thesis.tex": b"years of work"})
    with pytest.raises(ValueError, match=r"^[^\n]*thesis\.tex[^\n]*$"):
        prepare([str(folder)], out=out, config=CONFIG)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        prepare([str(folder)], out=out / "thesis.tex", config=CONFIG)
    with pytest.raises(ValueError, match="inside the source"):
        prepare([str(folder)], out=folder / "corpus", config=CONFIG)
    assert not (folder / "corpus").exists()
    with pytest.raises(ValueError, match="workers is 0"):
        prepare([str(folder)], out=tmp_path / "D", config=CONFIG, workers=0)
    assert not (tmp_path / "D").exists()


def test_a_run_in_progress_is_not_joined(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "f", count=2)
    out = tmp_path / "C"

    calls: list[str] = []

    def call_again(stage: str, done: int, total: int | None, *, note: str = "") -> None:
        calls.append(stage)
        if len(calls) > 1:
            return
        with pytest.raises(RuntimeError, match="another run is writing"):
            prepare([str(folder)], out=out, config=CONFIG)

    counts = prepare([str(folder)], out=out, config=CONFIG, progress=call_again)
    assert calls
    assert counts.kept == 2


def test_the_json_of_every_sample_names_its_source(tmp_path: Path) -> None:
    folders = [photo_folder(tmp_path / name, count=2, first=first) for name, first in (("one", 0), ("two", 10))]
    prepare([str(folder) for folder in folders], out=tmp_path / "C", config=PrepareConfig())
    records = [json.loads(member(tmp_path / "C", row, "json")) for row in table_rows(tmp_path / "C")]
    assert sorted(record["source"] for record in records) == ["one", "one", "two", "two"]
    assert len({tuple((name, type(value)) for name, value in record.items()) for record in records}) == 1
