"""MDS and litdata: files as their own libraries write them, and damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataprep.prepare import PrepareConfig, prepare
from dataprep.sources.column_mapping import ColumnConfig
from dataprep.sources.mds_litdata import PackedSamples
from dataprep.sources.open import open_sources
from tests.dataprep.helpers import digests, member, photo, row_of
from tests.pipeline.storage.servers import range_server

ENCODINGS = {"image": "jpeg", "n": "int", "p": "pkl", "text": "str", "w": "uint16"}
LENGTHS = {"n": 8, "w": 2}


def mds_file(rows: Sequence[dict[str, bytes]]) -> bytes:
    """As MosaicML's writer lays it out: the number of samples, their offsets, the writer's own config, the samples."""
    config = json.dumps({"what": "the writer's settings"}).encode()
    samples = [
        b"".join(struct.pack("<I", len(row[name])) for name in ENCODINGS if name not in LENGTHS) + b"".join(row[name] for name in ENCODINGS)
        for row in rows
    ]
    offsets = [4 + 4 * (len(rows) + 1) + len(config)]
    for sample in samples:
        offsets.append(offsets[-1] + len(sample))
    return struct.pack(f"<{len(offsets) + 1}I", len(rows), *offsets) + config + b"".join(samples)


def write_mds(folder: Path, *, shards: int = 2, each: int = 3, zipped: bool = False) -> Path:
    folder.mkdir(parents=True)
    listed = []
    for shard in range(shards):
        numbers = range(shard * each, shard * each + each)
        rows = [
            {
                "image": photo(number),
                "n": struct.pack("<q", -number),
                "p": b"cos\n_exit\n(I3\ntR.",  # whoever unpickles it ends this process
                "text": f"number {number}".encode(),
                "w": struct.pack("<H", number),
            }
            for number in numbers
        ]
        name = f"shard.{shard:05d}.mds"
        data = mds_file(rows)
        stored = zstandard.compress(data) if zipped else data
        (folder / f"{name}{'.zstd' if zipped else ''}").write_bytes(stored)
        listed.append(
            {
                "column_encodings": list(ENCODINGS.values()),
                "column_names": list(ENCODINGS),
                "column_sizes": [LENGTHS.get(name) for name in ENCODINGS],
                "compression": "zstd:7" if zipped else None,
                "format": "mds",
                "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
                "zip_data": {"basename": f"{name}.zstd", "bytes": len(stored), "hashes": {}} if zipped else None,
                "samples": each,
                "version": 2,
            }
        )
    (folder / "index.json").write_text(json.dumps({"shards": listed, "version": 2}))
    return folder


def test_mds_goes_the_whole_way(tmp_path: Path) -> None:
    plain, zipped = write_mds(tmp_path / "a/set"), write_mds(tmp_path / "b/set", zipped=True)
    before = digests(tmp_path)
    for folder, out in ((plain, "C"), (zipped, "D")):
        counts = prepare([str(folder)], out=tmp_path / out, config=PrepareConfig())
        assert (counts.kept, counts.notes) == (6, ["set: p is pickled and was left out, because a pickle can run code"])
    assert {name: digest for name, digest in digests(tmp_path).items() if name[0] in "ab"} == before
    row = row_of(tmp_path / "C", "shard.00001.mds:2")
    assert member(tmp_path / "C", row, "image") == photo(4)
    assert (row["caption"], row["n"], row["w"]) == ("number 4", -4, 4)
    assert "p" not in row
    assert member(tmp_path / "D", row_of(tmp_path / "D", "shard.00001.mds.zstd:2"), "image") == photo(4)


def test_mds_behind_a_url(tmp_path: Path) -> None:
    write_mds(tmp_path / "set", zipped=True)
    with range_server(tmp_path) as server:
        source = PackedSamples(f"{server.url}/set", name="set", columns=ColumnConfig())
        assert [sample.data for sample in source.samples()] == [photo(number) for number in range(6)]
        assert source.expected() == 6


def test_litdata_as_its_own_writer_writes_it(tmp_path: Path) -> None:
    writer = pytest.importorskip("litdata.streaming.writer").BinaryWriter(str(tmp_path / "plain"), chunk_size=2)
    for number in range(5):
        writer[number] = {"image": photo(number), "text": f"number {number}", "more": {"n": number, "f": 0.5, "t": (True, "x")}}
    writer.done()
    writer.merge()
    shutil.copytree(tmp_path / "plain", tmp_path / "zipped")
    index = json.loads((tmp_path / "zipped/index.json").read_text())
    index["config"]["compression"] = "zstd"
    for chunk in index["chunks"]:
        path = tmp_path / "zipped" / chunk["filename"]
        chunk["filename"] = chunk["filename"].replace(".bin", ".zstd.bin")
        path.with_name(chunk["filename"]).write_bytes(zstandard.compress(path.read_bytes()))
        path.unlink()
    (tmp_path / "zipped/index.json").write_text(json.dumps(index))
    for name in ("plain", "zipped"):
        before = digests(tmp_path / name)
        [source] = open_sources([str(tmp_path / name)])
        assert (source.layout, source.expected()) == ("litdata", 5)
        samples = list(source.samples())
        assert digests(tmp_path / name) == before
        assert [sample.captions for sample in samples] == [(f"number {number}",) for number in range(5)]
        assert samples[3].extra == {"more.n": 3, "more.f": 0.5, "more.t.0": True, "more.t.1": "x"}
        for number, sample in enumerate(samples):
            place = slice(sample.offset, sample.offset + (sample.length or 0))
            assert (Path(sample.file).read_bytes()[place] if sample.data is None else sample.data) == photo(number)


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    folder = write_mds(tmp_path / "set")
    index = json.loads((folder / "index.json").read_text())

    def refused(pattern: str, **changes: Any) -> None:
        broken = {**index, "shards": [{**index["shards"][0], **changes}]}
        (folder / "index.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"^[^\n]*{pattern}[^\n]*$"):
            open_sources([str(folder)])

    refused("outside its folder", raw_data={"basename": "../x.mds"})
    refused("compressed by br", compression="br:3", zip_data={"basename": "x.mds.br"})
    refused("format json", format="json")
    refused("KeyError", raw_data={})
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: cannot be read"):
        open_sources([str(folder)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mds(tmp_path_factory.mktemp("whole") / "set", shards=1)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 255)), max_size=4), st.integers(0, 4000))
def test_damaged_files_are_rows_of_the_account(whole: Path, tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray((whole / "shard.00000.mds").read_bytes())
    for place, value in changes:
        content[place] = value
    (tmp_path / "index.json").write_bytes((whole / "index.json").read_bytes())
    (tmp_path / "shard.00000.mds").write_bytes(content[: max(0, len(content) - cut)])
    [source] = open_sources([str(tmp_path)])
    samples = list(source.samples())
    assert len(samples) == 3 or samples[-1].reason == "bad-record"
    size = (tmp_path / "shard.00000.mds").stat().st_size
    assert all(sample.offset + (sample.length or 0) <= size for sample in samples)
