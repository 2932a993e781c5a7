"""Data sets of the datasets library: saved to disk, and streamed from a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep.prepare import PrepareConfig, prepare
from dataprep.sources.hf_datasets import is_on_hub
from dataprep.sources.open import SourceConfig, open_sources
from tests.dataprep.helpers import member, photo, row_of, write_tar
from tests.dataprep.sources.hub_server import COMMIT, hub_server


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits, as `save_to_disk` leaves them; the images of one lie in files."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    folder = tmp_path_factory.mktemp("saved")
    (folder / "outside.jpg").write_bytes(photo(9))
    features = Features({"image": Image(), "caption": Value("string"), "label": ClassLabel(names=["cat", "dog"])})
    inside = [
        {"image": {"bytes": photo(number), "path": f"{number}.jpg"}, "caption": f"no {number}", "label": number % 2} for number in range(4)
    ]
    named = [{"image": {"bytes": None, "path": str(folder / "outside.jpg")}, "caption": "outside", "label": 0}]
    splits = DatasetDict()
    for name, rows in (("train", inside), ("test", named)):
        splits[name] = Dataset.from_list(rows, features=features)
    splits.save_to_disk(str(folder / "pets"))
    return folder / "pets"


def test_saved_to_disk(saved: Path, tmp_path: Path) -> None:
    [source] = open_sources([str(saved)])
    assert source.reads() == "pets: pets, split train, images from image, captions from caption, classes from label"
    samples = list(source.samples())
    assert [sample.data for sample in samples] == [photo(number) for number in range(4)]
    assert [(sample.path, sample.captions, sample.label) for sample in samples[:2]] == [
        ("train:1", ("no 0",), 0),
        ("train:2", ("no 1",), 1),
    ]
    assert samples[1].extra == {"class_name": "dog", "image_path": "1.jpg"}
    [test] = open_sources([f"pets={saved}"], named={"pets": SourceConfig(split="test")})
    assert [sample.data for sample in test.samples()] == [photo(9)]  # the library has brought it in
    assert test.digest() != source.digest()
    [one] = open_sources([str(saved / "test")])
    assert [sample.captions for sample in one.samples()] == [("outside",)]
    with pytest.raises(ValueError, match=r"^[^\n]*has no split dev; there are train, test[^\n]*$"):
        open_sources([f"pets={saved}"], named={"pets": SourceConfig(split="dev")})
    counts = prepare([str(saved)], out=tmp_path / "C", config=PrepareConfig())
    assert counts.kept == 4
    assert member(tmp_path / "C", row_of(tmp_path / "C", "train:3"), "image") == photo(2)


READ = """
import json, sys
from dataprep.sources.open import SourceConfig, open_sources
said = []
for spec in sys.argv[1:]:
    [source] = open_sources([spec])
    samples = [[s.path, list(s.captions), s.extra, s.file, s.reason, s.data.hex() if s.data else ""] for s in source.samples()]
    said.append({"name": source.name, "reads": source.reads(), "digest": source.digest(), "samples": samples})
print(json.dumps(said))
"""


def test_streamed_from_a_hub(tmp_path: Path) -> None:
    parquet, tars = tmp_path / "parquet", tmp_path / "tars"
    (parquet / "data").mkdir(parents=True)
    tars.mkdir()
    images = [{"bytes": photo(number), "path": f"{number}.jpg"} for number in range(3)]
    images.append({"bytes": None, "path": "/etc/hostname"})  # what a stranger's data set must not reach
    table = pa.table({"image": images, "text": [f"no {number}" for number in range(4)]})
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(info), parquet / "data/train-00000-of-00001.parquet")
    records = [json.dumps({"alt": f"alt {number}", "score": number}).encode() for number in range(2)]
    write_tar(
        tars / "00000.tar",
        [member for number in range(2) for member in ((f"{number}.jpg", photo(number)), (f"{number}.json", records[number]))],
    )

    def read(url: str, *specs: str) -> list[dict]:
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        settings["USE_TORCH"] = "0"  # which would take half of the time to import, for nothing
        command = [sys.executable, "-c", READ, *specs]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with hub_server(parquet, repo="me/pets") as hub:
        [stream, file] = read(hub.url, "hf:me/pets", f"hf://datasets/me/pets@{COMMIT}/data/train-00000-of-00001.parquet")
        assert not hub.unknown
    assert (stream["name"], stream["reads"]) == ("pets", "pets: hf:me/pets, split train, images from image, captions from text")
    assert [sample[0] for sample in stream["samples"]] == [f"train:{number}" for number in range(1, 5)]
    assert [bytes.fromhex(sample[5]) for sample in stream["samples"]] == [photo(0), photo(1), photo(2), b""]
    assert [sample[4] for sample in stream["samples"]] == ["", "", "", "bad-record"]
    assert [sample[5:] for sample in file["samples"]] == [sample[5:] for sample in stream["samples"]]

    with hub_server(tars, repo="me/shards") as hub:
        [stream] = read(hub.url, "hf://datasets/me/shards")
    assert stream["reads"].endswith("images from jpg, captions from alt")
    assert [sample[:3] for sample in stream["samples"]] == [
        ["00000.tar/0", ["alt 0"], {"jpg_path": "0.jpg", "score": 0}],
        ["00000.tar/1", ["alt 1"], {"jpg_path": "1.jpg", "score": 1}],
    ]
    assert [bytes.fromhex(sample[5]) for sample in stream["samples"]] == [photo(0), photo(1)]


def test_names_on_the_hub() -> None:
    names = ["hf:mnist", "hf:me/pets", "hf:me/pets@v1", "hf://datasets/me/pets", "hf://datasets/me/pets@refs/convert/parquet"]
    assert [is_on_hub(name) for name in names] == [True] * 5
    others = ["hf://datasets/me/pets/data/x.parquet", "hf://me/pets", "photos", "https://x/y", "hf:", "hf:a/b/c"]
    assert [is_on_hub(name) for name in others] == [False, False, False, False, False, False]
