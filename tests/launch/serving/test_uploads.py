from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.serving import uploads as uploads_module
from launch.serving.limits import Busy, Limits
from launch.serving.uploads import Upload, Uploads, read_upload
from pipeline.workers.process import Report
from tests.launch.serving.server import noise


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    uploads = Uploads(Limits(max_side=100, max_upload_mb=1))
    yield uploads
    uploads.close()


def dies(task: Upload, report: Report) -> object:
    """A decoder that crashes on some bytes."""
    if b"crash" in task.data and not task.is_lost:
        report(0)
        os.kill(os.getpid(), signal.SIGSEGV)
    return read_upload(task, report)


def test_a_file_that_crashes_its_decoder_is_a_sentence(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "read_upload", dies)
    with pytest.raises(ValueError, match="image: its decoder failed"):
        uploads.image(b"crash", named="image")
    assert uploads.image(noise(5, 4), named="image").size == (5, 4)


def stalls(task: Upload, report: Report) -> object:
    """A process that stops before it begins with the file."""
    if b"stall" in task.data:
        os.kill(os.getpid(), signal.SIGSTOP)
    return read_upload(task, report)


def test_a_process_that_does_not_begin_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "_SECONDS", 5.0)
    monkeypatch.setattr(uploads_module, "read_upload", stalls)
    uploads = Uploads(Limits(max_side=100, max_upload_mb=1))
    try:
        with pytest.raises(ValueError, match="image: could not be read, because the server is too busy"):
            uploads.image(b"stall", named="image")
        assert uploads.image(noise(5, 4), named="image").size == (5, 4)
    finally:
        uploads.close()


def test_places_are_limited_for_all_and_for_each_client(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "_WAITING", 3)
    with uploads.place("a"), uploads.place("a"):
        with pytest.raises(Busy, match="the server reads other uploads; try again"), uploads.place("a"):
            pass
        with uploads.place("b"), pytest.raises(Busy), uploads.place("c"):
            pass
    with uploads.place("c"):
        pass


def test_limits_of_a_file(uploads: Uploads, shared: Path) -> None:
    with pytest.raises(ValueError, match=r"image: has 1,000,001 bytes, the limit is 1 MB"):
        uploads.image(bytes(1_000_001), named="image")
    with pytest.raises(ValueError, match="mask: has 101x2 pixels, the limit is 100 a side"):
        uploads.mask(noise(101, 2), named="mask")
    with pytest.raises(ValueError, match="image: has more than 16,777,216 pixels"):
        uploads.image((shared / "corpora" / "hostile" / "bomb.png").read_bytes(), named="image")
    with pytest.raises(ValueError, match="image: has no settings of its drawing"):
        uploads.recorded(noise(5, 4), named="image")
