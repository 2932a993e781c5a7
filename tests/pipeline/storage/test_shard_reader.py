from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.storage.shard_reader import BadShard, ShardReader


def test_parts_of_many_files_with_few_open(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.tar" for i in range(10)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * 100 + b"tail")
    reader = ShardReader(max_open_files=3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i, file in enumerate(files):
            assert reader.read(str(file), offset=98, length=4) == bytes([i, i]) + b"ta"
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read(str(files[0]), offset=0, length=0) == b""


def test_a_file_that_ends_too_early_or_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "0.tar"
    file.write_bytes(b"12345")
    reader = ShardReader()
    with pytest.raises(OSError, match=r"0\.tar ends before byte 6, it is truncated"):
        reader.read(str(file), offset=3, length=3)
    with pytest.raises(BadShard, match=r"1\.tar is missing: restore the file"):
        reader.read(str(tmp_path / "1.tar"), offset=0, length=1)
