"""The same bytes from a job array, from Ray and at a URL; and what happens when memory or the disk runs out."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dataprep.examine.run import JobPart
from dataprep.prepare import AppendMode, PrepareConfig, prepare, prepare_part
from dataprep.workers.pool import LocalPool
from launch.cli import main
from pipeline.workers.pool import WorkerDied
from tests import REPOSITORY
from tests.dataprep.helpers import digests, photo, photo_folder, row_of, start_prepare, write_folder
from tests.pipeline.workers.test_pool import Job, square, walk

CONFIG = PrepareConfig.model_validate({"shards": {"max_samples": 500}})


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than one chunk of inputs, few of which are images."""
    files = {f"{number:04d}.jpg": photo(number) if number % 8 == 0 else b"" for number in range(1100)}
    return write_folder(tmp_path_factory.mktemp("many"), files, rows=[{"file_name": name, "text": name} for name in files])


@pytest.fixture(scope="module")
def reference(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "C"
    prepare([str(many)], out=out, config=CONFIG)
    return digests(out)


def test_parts_are_merged_to_the_same_bytes(many: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "C"
    with pytest.raises(RuntimeError, match="no part has been examined yet: run part 1/N"):
        prepare([str(many)], out=out, config=CONFIG, merge=True)
    done = prepare_part([str(many)], out=out, config=CONFIG, part=JobPart(2, 2))
    assert (done.inputs, sorted(path.name for path in (out / ".work").glob("chunk*"))) == (1100, ["chunk-000001.arrow"])
    with pytest.raises(RuntimeError, match=r"1 part\(s\) are unfinished: run part 1/2 \(again\) before the merge"):
        prepare([str(many)], out=out, config=CONFIG, merge=True)
    prepare_part([str(many)], out=out, config=CONFIG, part=JobPart(1, 2))
    prepare([str(many)], out=out, config=CONFIG, merge=True)
    assert digests(out) == reference


def test_what_the_command_line_refuses(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as exit_code:
            main(["prepare", str(many), "--out", str(tmp_path / "C"), *options])
        assert exit_code.value.code == 2
        return capsys.readouterr().err

    assert "--part 3/2: expected K/N with K from 1 to N" in refused("--part", "3/2")
    assert "--part and --merge: give one of them" in refused("--part", "1/2", "--merge")
    assert "--executor slurm: expected local or ray" in refused("--executor", "slurm")
    assert "--ray-address x: requires --executor ray" in refused("--ray-address", "x")
    assert "http://x/C: nothing can be written over HTTP" in refused("--out", "http://x/C")
    assert not (tmp_path / "C").exists()


def test_ray_writes_the_same_bytes_and_survives_its_workers(
    many: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from dataprep.workers.ray_pool import RayPool

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match="the Ray cluster has 2 CPUs"):
            RayPool(3)
        with RayPool() as pool:
            jobs = [Job(0), Job(1, deadly=(0, 4)), Job(2)]
            assert list(pool.map(walk, jobs, retry=lambda job, death: Job(job.number, job.deadly, (*job.skip, death.at)))) == [
                (0, 0),
                (1, 2),
                (2, 0),
            ]
        prepare([str(many)], out=tmp_path / "C", config=CONFIG, pool=RayPool(2))
        assert digests(tmp_path / "C") == reference
    finally:
        ray.shutdown()


def test_a_corpus_at_a_url_is_the_local_one(
    many: Path, reference: dict[str, str], tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    out, work = f"{bucket}/sets/C", tmp_path / "work"
    with start_prepare([many], out=out, config=CONFIG, work=work) as process:
        while process.poll() is None and not files.exists(f"{out}/000000.parquet"):
            files.invalidate_cache()
        process.kill()
    assert not files.exists(f"{out}/manifest.json")
    with pytest.raises(ValueError, match=r"s3://bucket/sets/C: holds an unfinished corpus with another seed \(0 there, 1 here\)"):
        prepare([str(many)], out=out, config=CONFIG.model_copy(update={"seed": 1}), work=work)
    counts = prepare([str(many)], out=out, config=CONFIG, work=work)
    files.invalidate_cache()
    local = tmp_path / "C"
    files.get(f"{out}/", f"{local}/", recursive=True)
    assert digests(local) == reference
    assert not work.exists()
    assert prepare([str(many)], out=out, config=CONFIG, work=work) == counts

    new = photo_folder(tmp_path / "new", count=3, first=9000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in (out, local):
        grown = prepare([str(new)], out=place, config=CONFIG, append_mode=AppendMode(append=True, retry=False))
        assert grown.kept == counts.kept + 3
    files.invalidate_cache()
    files.get(f"{out}/", f"{tmp_path / 'D'}/", recursive=True)
    assert digests(tmp_path / "D") == digests(local)
    with pytest.raises(ValueError, match=r"s3://bucket/sets: not empty \(C is in it\) and not a corpus"):
        prepare([str(many)], out=f"{bucket}/sets", config=CONFIG)


def hungry(number: int, report: Callable[[int], None]) -> int:
    report(number)
    return len(bytearray(number))


def test_memory_is_limited() -> None:
    with LocalPool(1, memory=600_000_000) as pool:
        assert list(pool.map(hungry, [50_000_000])) == [50_000_000]
        with pytest.raises(WorkerDied, match="needed more memory than a worker may take") as death:
            list(pool.map(hungry, [2_000_000_000]))
        assert death.value.at == 2_000_000_000
        assert list(pool.map(square, [3])) == [9]


def test_an_image_that_needs_too_much_memory_is_one_rejection(tmp_path: Path) -> None:
    blank = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(blank, "PNG", compress_level=0)
    files = {"large.png": blank.getvalue(), "a.jpg": photo(2), "b.jpg": photo(3)}
    folder = write_folder(tmp_path / "f", files, rows=[{"file_name": name, "text": name} for name in files])
    counts = prepare([str(folder)], out=tmp_path / "C", config=CONFIG, pool=LocalPool(1, memory=700_000_000))
    assert (counts.kept, counts.rejected) == (2, {"crashed": 1})
    assert "more memory than a worker may take" in row_of(tmp_path / "C", "large.png")["detail"]


FULL_DISK = """
import resource, sys
from dataprep.prepare import PrepareConfig, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare([{source!r}], out={out!r}, config=PrepareConfig.model_validate({config!r}))
except RuntimeError as error:
    print(error)
    sys.exit(error.__cause__.errno)
"""


@pytest.mark.parametrize("limit", [20_000, 100_000])
def test_a_full_disk_is_told_and_the_run_goes_on_later(many: Path, reference: dict[str, str], tmp_path: Path, limit: int) -> None:
    """The limit is one on the size of files: the first stops the tables of pass 1, the second the shards."""
    out = tmp_path / "C"
    command = FULL_DISK.format(limit=limit, source=str(many), out=str(out), config=CONFIG.model_dump())
    done = subprocess.run([sys.executable, "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (errno.EFBIG, 1), done.stderr
    assert "the disk is full; finished work is kept: free some space, and run the same command again" in done.stdout
    assert not list(out.rglob("*.tmp"))
    prepare([str(many)], out=out, config=CONFIG)
    assert digests(out) == reference
