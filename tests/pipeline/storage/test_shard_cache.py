"""The cache of remote shards: many processes, no room, wrong bytes, and processes that are killed."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.storage import remote
from pipeline.storage.shard_cache import BadShard, ShardCache, ShardFacts
from pipeline.storage.shard_reader import ByteRange, ShardReader
from tests import REPOSITORY
from tests.pipeline.storage.servers import RangeServer, range_server

SIZE, SHARDS = 200_000, 6
CONTENTS = [random.Random(i).randbytes(SIZE) for i in range(SHARDS)]
FACTS = [ShardFacts(SIZE, hashlib.sha256(data).hexdigest()) for data in CONTENTS]

READER = """
import sys, random
from tests.pipeline.storage.test_shard_cache import CONTENTS, FACTS, SIZE
from pipeline.storage.shard_reader import ByteRange, ShardCache, ShardReader

url, folder, limit, seed = sys.argv[1:]
urls = [f"{url}/{i}.tar" for i in range(len(FACTS))]
reader = ShardReader(facts=dict(zip(urls, FACTS)), cache=ShardCache(folder, limit=int(limit)))
draw = random.Random(int(seed))
for _ in range(40):
    shards = draw.sample(range(len(FACTS)), 2)
    parts = [ByteRange(urls[i], draw.randrange(SIZE - 100), 100) for i in shards]
    for i, part, found in zip(shards, parts, reader.read_parts(parts), strict=True):
        assert found == CONTENTS[i][part.offset : part.offset + 100], found
print("done")
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    for i, data in enumerate(CONTENTS):
        (folder / f"{i}.tar").write_bytes(data)
    with range_server(folder) as server:
        yield server


def start_reader(server: RangeServer, folder: Path, *, limit: int, seed: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", READER, server.url, str(folder), str(limit), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def bytes_in(folder: Path) -> int:
    """Those of shards, whole or in part, as they may not be more than the limit at any time."""
    total = 0
    for file in folder.glob("*.*"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def test_many_processes_share_a_cache_that_has_room_for_all(server: RangeServer, tmp_path: Path) -> None:
    readers = [start_reader(server, tmp_path / "cache", limit=SHARDS * SIZE, seed=seed) for seed in range(3)]
    assert [reader.communicate(timeout=120)[0] for reader in readers] == ["done\n"] * 3
    assert sum(server.asked.values()) == SHARDS  # each was downloaded once, and nothing else was asked for


def test_many_processes_share_a_cache_that_is_too_small(server: RangeServer, tmp_path: Path) -> None:
    folder, limit = tmp_path / "cache", 3 * SIZE + 10
    readers = [start_reader(server, folder, limit=limit, seed=seed) for seed in range(3)]
    most = 0
    while any(reader.poll() is None for reader in readers):
        most = max(most, bytes_in(folder))
    assert [reader.communicate()[0] for reader in readers] == ["done\n"] * 3
    assert SIZE <= most <= limit
    assert not list(folder.glob("*.part"))
    for i, facts in enumerate(FACTS):
        whole = folder / f"{facts.sha256}.tar"
        assert not whole.exists() or whole.read_bytes() == CONTENTS[i]


def test_a_process_killed_in_the_middle_of_a_download_leaves_nothing_that_counts(server: RangeServer, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    server.open.clear()
    with start_reader(server, folder, limit=SIZE, seed=0) as reader:
        assert server.hanging.wait(60)
        assert [file.stat().st_size for file in folder.glob("*.part")] == [SIZE]
        reader.kill()
    server.open.set()
    urls = [f"{server.url}/{i}.tar" for i in range(SHARDS)]
    shards = ShardReader(facts=dict(zip(urls, FACTS, strict=True)), cache=ShardCache(folder, limit=SIZE))
    for i in range(SHARDS):
        assert shards.read_parts([ByteRange(urls[i], 5, 50)]) == [CONTENTS[i][5:55]]
        assert [file.name for file in folder.glob("*.*")] == [f"{FACTS[i].sha256}.tar"]


def test_the_longest_unread_go_first_and_what_is_being_read_stays(server: RangeServer, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = ShardCache(folder, limit=2 * SIZE)

    def open_shard(i: int) -> int | None:
        return cache.open(f"{server.url}/{i}.tar", facts=FACTS[i])

    def cached() -> set[int]:
        return {i for i, facts in enumerate(FACTS) if (folder / f"{facts.sha256}.tar").exists()}

    for i in (0, 1, 0, 2):
        descriptor = open_shard(i)
        assert descriptor is not None
        os.close(descriptor)
    assert cached() == {0, 2}
    held = [open_shard(0), open_shard(3)]
    assert cached() == {0, 3}
    assert open_shard(4) is None
    for descriptor in held:
        assert descriptor is not None
        os.close(descriptor)
    assert open_shard(4) is not None
    assert cached() == {3, 4}


def test_wrong_bytes_do_not_enter(server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    (server.folder / "0.tar").write_bytes(CONTENTS[1])
    cache = ShardCache(tmp_path / "cache", limit=3 * SIZE)
    with pytest.raises(BadShard, match=r"0\.tar does not match its digest in the manifest"):
        cache.open(f"{server.url}/0.tar", facts=FACTS[0])
    (server.folder / "1.tar").unlink()
    with pytest.raises(BadShard, match=r"1\.tar is missing"):
        cache.open(f"{server.url}/1.tar", facts=FACTS[1])
    assert not list((tmp_path / "cache").glob("*.tar"))
