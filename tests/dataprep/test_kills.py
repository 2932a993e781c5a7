"""Killed at any moment and called again, preparation ends with the bytes of an unbroken run."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pytest

from dataprep.prepare import PrepareConfig, prepare
from tests.dataprep.helpers import digests, photo, start_prepare, write_folder, write_tar

CONFIG = PrepareConfig.model_validate({"shards": {"max_samples": 100}, "dedup": {"near": "drop"}})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder of more than one chunk and a tar, with images that are re-encoded, broken, alike and the same."""
    folder = tmp_path_factory.mktemp("sources")
    files = {f"{number:05d}.jpg": photo(number % 1100, format="PNG" if number % 7 == 0 else "JPEG") for number in range(1150)}
    files |= {f"cut-{number}.jpg": photo(2000 + number)[:300] for number in range(9)}
    files |= {f"like-{number}.jpg": photo(number, height=80, width=96) for number in range(5)}
    write_folder(folder / "set", files, rows=[{"file_name": name, "text": f"image {name}"} for name in files])
    write_tar(
        folder / "t.tar", [member for number in range(60) for member in ((f"{number}.jpg", photo(3000 + number)), (f"{number}.txt", b"x"))]
    )
    return [str(folder / "set"), str(folder / "t.tar")]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_kills_at_random_times_change_no_byte(sources: list[str], tmp_path: Path, kills: int) -> None:
    began = time.monotonic()
    start_prepare(sources, out=tmp_path / "whole", config=CONFIG, workers=2).wait()
    seconds = time.monotonic() - began
    reference = digests(tmp_path / "whole")
    moments, done = random.Random(kills), 0
    for attempt in range(10 * kills):
        out = tmp_path / f"killed-{attempt}"
        while done < kills:
            process = start_prepare(sources, out=out, config=CONFIG, workers=2)
            try:
                process.wait(timeout=moments.uniform(0.2, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
            else:
                break
        counts = prepare(sources, out=out, config=CONFIG)
        assert counts.inputs == counts.kept + sum(counts.rejected.values()) == 1224
        assert digests(out) == reference
        if done == kills:
            return
    raise AssertionError("it was finished each time before it could be killed")
