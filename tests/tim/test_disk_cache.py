"""Results on disk: found again whole, never trusted when damaged, bounded in size, and without effect where nothing can be written."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import REPOSITORY
from tim.disk_cache import DiskCache, default_folder, key
from tim.pretrained import safetensors_files

TENSORS = {
    "features": torch.arange(12.0).view(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "number": torch.tensor(7),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def name(part: object) -> str:
    return f"text-{key(str(part))}"


X, Y = name("x"), name("y")


def same(one: dict[str, Tensor] | None, other: dict[str, Tensor]) -> bool:
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def test_a_result_is_found_again_by_any_process(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "a" / "cache")
    assert cache.read(X) is None
    cache.write(X, TENSORS)
    assert same(DiskCache(tmp_path / "a" / "cache").read(X), TENSORS)
    cache.write(X, {"features": TENSORS["half"]})
    assert same(cache.read(X), {"features": TENSORS["half"]})
    assert os.listdir(cache.folder) == [f"{X}.safetensors"]


def test_a_damaged_file_is_no_result_and_is_replaced(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.write(X, {"features": TENSORS["features"]})
    whole = (tmp_path / f"{X}.safetensors").read_bytes()
    for position in range(len(whole)):
        for mask in (0x01, 0xFF):
            (tmp_path / f"{X}.safetensors").write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
            found = cache.read(X)
            assert found is None or same(found, {"features": TENSORS["features"]}), position
    for length in range(0, len(whole), 7):
        (tmp_path / f"{X}.safetensors").write_bytes(whole[:length])
        assert cache.read(X) is None
    cache.write(X, TENSORS)
    assert same(cache.read(X), TENSORS)


def test_the_least_recently_used_results_are_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=64 * 4096)
    for number in range(40):
        cache.write(name(number), {"x": torch.full((900,), float(number))})
        os.utime(tmp_path / f"{name(number)}.safetensors", (1e9 + number, 1e9 + number))
    assert cache.read(name(0)) is not None  # used just now
    dead, live = (tmp_path / f"{each}.safetensors.{32 * '0'}.tmp" for each in (X, Y))
    others = [tmp_path / each for each in ("notes.txt", "model.safetensors", "work.tmp")]
    for path in (dead, live, *others):
        path.write_bytes(bytes(1_000_000))
        if path != live:
            os.utime(path, (1e9 - 1, 1e9 - 1))
    for number in range(40, 100):
        cache.write(name(number), {"x": torch.full((900,), float(number))})
        os.utime(tmp_path / f"{name(number)}.safetensors", (1e9 + number, 1e9 + number))
        size = sum(-(-file.stat().st_size // 4096) * 4096 for file in tmp_path.glob("text-*.safetensors"))
        assert size <= 64 * 4096
    assert cache.read(name(0)) is not None
    assert cache.read(name(1)) is None
    assert cache.read(name(99)) is not None
    assert {path for path in tmp_path.iterdir() if not re.fullmatch(r"text-\w{64}\.safetensors", path.name)} == {live, *others}


WRITER = """
import logging, sys, torch
from tim.disk_cache import DiskCache, key
logging.basicConfig(level=logging.WARNING)
cache = DiskCache(sys.argv[1], limit=16 * 8192)
for turn in range(300):
    number = turn * int(sys.argv[2]) % 23
    name = f"text-{key(str(number))}"
    found = cache.read(name)
    if found is None:
        cache.write(name, {"x": torch.full((1500,), float(number))})
    else:
        assert torch.equal(found["x"], torch.full((1500,), float(number)))
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "cache", step], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        for step in ("3", "7")
    ]
    assert [process.communicate(timeout=120)[1] for process in running] == ["", ""]
    assert [process.returncode for process in running] == [0, 0]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_what_cannot_be_written_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/tim-cache")):
        caplog.clear()
        cache = DiskCache(folder)
        for each in (X, Y):
            assert cache.read(each) is None
            cache.write(each, TENSORS)
            DiskCache(folder).write(each, TENSORS)
        assert not cache.make_folder()
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert str(folder) in record.getMessage()
        assert "set TIM_CACHE to another folder" in record.getMessage()

    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as stream:
            stream.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    caplog.clear()
    monkeypatch.setattr(Path, "write_bytes", full)
    for each in (X, Y):
        DiskCache(tmp_path / "full").write(each, TENSORS)
    [record] = caplog.records
    assert record.getMessage().startswith(f"cache {tmp_path / 'full'} cannot be written (No space left on device): results are computed")
    assert not os.listdir(tmp_path / "full")


def test_the_digest_of_a_large_file_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    read: list[Path] = []
    original = safetensors_files.file_digest
    monkeypatch.setattr(safetensors_files, "file_digest", lambda path: (read.append(path), original(path))[1])
    for content in (bytes(2_000_000), b"\1" + bytes(1_999_999)):  # of the same size, and of the same date
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))
        read.clear()
        for cache in (DiskCache(tmp_path / "cache"), DiskCache(tmp_path / "cache")):
            assert cache.file_digest(file) == original(file)
        assert read == [file]
    file.write_bytes(b"small")
    assert DiskCache(tmp_path / "cache").file_digest(file) == original(file)
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIM_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"
    monkeypatch.delenv("TIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "tim" / "results"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = DiskCache.default()
    assert cache is not None
    assert cache.folder == tmp_path / ".cache" / "tim" / "results"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert DiskCache.default() is None


def test_a_key_separates_its_parts() -> None:
    assert len({key("a", "b"), key("ab"), key("a", "b", ""), key("a\ud83d", "b"), key('a", "b')}) == 5
