"""Shards and corpora behind URLs, from servers that fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from pipeline.corpus.corpus import Corpus
from pipeline.storage import remote
from pipeline.storage.shard_cache import ShardCache
from pipeline.storage.shard_reader import BadShard, ByteRange, ShardFacts, ShardReader
from tests.pipeline.loading.test_loader import assert_same, make_loader
from tests.pipeline.storage.servers import RangeServer, range_server

DATA = np.random.default_rng(0).bytes(1_000_000)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "0.tar").write_bytes(DATA)
    with range_server(tmp_path) as server:
        yield server


def test_parts_survive_dropped_connections_and_short_answers(server: RangeServer) -> None:
    url = f"{server.url}/0.tar"
    server.faults = 3
    parts = [ByteRange(url, 900_000, 100), ByteRange(url, 10, 200), ByteRange(url, 500, 1000), ByteRange(url, 0, 0)]
    reader = ShardReader(facts={url: ShardFacts(len(DATA), "")})
    assert reader.read_parts(parts) == [DATA[offset : offset + length] for _, offset, length in parts]
    ranges = {request: times for request, times in server.asked.items() if request.startswith("GET")}
    assert ranges == {"GET /0.tar ('900000', '900099')": 4, "GET /0.tar ('0', '1499')": 4}  # neighbours are one request


def test_a_server_that_never_gives_what_was_asked_for(server: RangeServer) -> None:
    server.ignores_ranges = True
    with pytest.raises(OSError, match=r"0\.tar returned 1000000 of the 10 bytes requested from byte 5"):
        ShardReader().read(f"{server.url}/0.tar", offset=5, length=10)
    server.ignores_ranges, server.faults = False, 100
    with pytest.raises(OSError, match=r"0\.tar cannot be read: "):
        ShardReader().read(f"{server.url}/0.tar", offset=6, length=10)
    assert server.asked["GET /0.tar ('6', '15')"] >= remote.ATTEMPTS  # the HTTP library repeats some by itself


def test_a_remote_shard_that_is_missing_or_of_another_size(server: RangeServer) -> None:
    facts = {f"{server.url}/{name}.tar": ShardFacts(len(DATA) + 1, "") for name in "01"}
    with pytest.raises(BadShard, match=r"0\.tar has 1000000 bytes, the manifest says 1000001"):
        ShardReader(facts=facts).read(f"{server.url}/0.tar", offset=0, length=1)
    with pytest.raises(BadShard, match=r"1\.tar is missing"):
        ShardReader(facts=facts).read(f"{server.url}/1.tar", offset=0, length=1)


def test_what_to_install_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^abfs://a/b/manifest.json cannot be read: .*adlfs.*pip install 'tim\[remote\]'") as caught:
        Corpus.open("abfs://a/b")
    assert "\n" not in str(caught.value)


def test_a_corpus_on_s3_is_planned_and_read_like_a_local_one(
    corpus: Corpus, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    s3fs.S3FileSystem().put(f"{corpus.path}/", f"{bucket}/corpus/", recursive=True)
    there = Corpus.open(f"{bucket}/corpus/")
    assert (there.name, there.digest, there.count) == (corpus.name, corpus.digest, corpus.count)
    here = list(islice(make_loader(corpus), 4))
    cache = ShardCache(tmp_path / "cache", limit=10_000_000)
    for loader in (make_loader(there, workers=1), make_loader(there, cache=cache)):
        assert_same(here, list(islice(loader, 4)))
        loader.close()
    assert {path.stem for path in (tmp_path / "cache").glob("*.tar")} == {
        hashlib.sha256(Path(shard.path).read_bytes()).hexdigest() for shard in corpus.shards
    }
    assert main(["plan", "demo", f"corpus={bucket}/corpus", "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["account"]["rows"] == 24
