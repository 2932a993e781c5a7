"""`samples.jsonl`, appended by one or several processes."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from launch.sampling.files.samples_file import NAME, Sample, append_sample, read_samples
from launch.sampling.files.settings import Settings
from tests.launch.sampling.files.test_settings import FULL


def sample(number: int, settings: Settings = FULL) -> Sample:
    return Sample(PurePosixPath(f"{number:04d}.png"), replace(settings, seed=number), {"evaluations": 2 * number})


def test_rows_are_json_and_read_back(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == {}
    samples = [sample(0), sample(1, Settings(prompt="two\nlines \0 😀", width=3, height=4)), sample(2)]
    for each in samples:
        append_sample(tmp_path, each)
    lines = (tmp_path / NAME).read_bytes().splitlines()
    assert [json.loads(line)["evaluations"] for line in lines] == [0, 2, 4]
    assert json.loads(lines[1])["prompt"] == "two\nlines \0 😀"
    assert list(read_samples(tmp_path).values()) == samples


def test_the_last_row_of_an_image_counts(tmp_path: Path) -> None:
    for each in (sample(0), sample(1), replace(sample(0), notes={"evaluations": 9})):
        append_sample(tmp_path, each)
    assert [row.notes["evaluations"] for row in read_samples(tmp_path).values()] == [2, 9]


@pytest.mark.parametrize("rest", [b'{"file": "0001.p', b"x" * 200_000])
def test_a_row_that_was_cut_short_is_removed(tmp_path: Path, rest: bytes) -> None:
    append_sample(tmp_path, sample(0))
    with open(tmp_path / NAME, "ab") as stream:
        stream.write(rest)
    assert list(read_samples(tmp_path).values()) == [sample(0)]
    append_sample(tmp_path, sample(2))
    assert list(read_samples(tmp_path).values()) == [sample(0), sample(2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"x\n", "not JSON"),
        (b"[]\n", "`file`"),
        (b'{"prompt": "a"}\n', "`file`"),
        (b'{"file": "a"}\n', "key 'prompt'"),
        (b"\xff\n", "not JSON"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    append_sample(tmp_path, sample(0))
    with open(tmp_path / NAME, "ab") as stream:
        stream.write(line)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / NAME}, line 2: ") + f".*{message}"):
        read_samples(tmp_path)


def test_several_processes_append_whole_rows(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.launch.sampling.files.test_samples_file import *\n"
        "for number in range(50): append_sample(Path(sys.argv[1]), sample(100 * int(sys.argv[2]) + number))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert sorted(row.settings.seed or 0 for row in read_samples(tmp_path).values()) == [*range(50), *range(100, 150)]


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    append_sample(tmp_path, sample(0))
    size = (tmp_path / NAME).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / NAME))):
            append_sample(tmp_path, sample(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / NAME).stat().st_size == size
