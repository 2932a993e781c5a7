"""Read one of our corpora with other people's readers: datasets, webdataset, Energon, and tools made for img2dataset.

A corpus is plain WebDataset with img2dataset's names, so each of them opens it as it is. Every reader prints the first caption and how many
samples it saw; all see the same.

    tim prepare PHOTOS --out corpus
    python examples/readers.py corpus
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import webdataset
from PIL import Image

Seen = Iterator[tuple[Image.Image, str]]


def hugging_face(corpus: Path) -> Seen:
    """The README names the files: a local folder, or a data set on the hub, opens by its name."""
    for row in datasets.load_dataset(str(corpus), split="train", streaming=True):
        yield row["jpg"], row["txt"]


def plain_webdataset(corpus: Path) -> Seen:
    shards = sorted(map(str, corpus.glob("*.tar")))
    yield from webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg", "txt")


def energon(corpus: Path) -> Seen:
    """What Megatron-Energon does once `energon prepare CORPUS` has written its `.nv-meta` folder, with split ratio 1,0,0 and this:

    sample_type: {__module__: megatron.energon, __class__: CaptioningSample}
    field_map: {image: jpg, caption: txt}

    It needs members of a sample side by side under one key, unique keys, and the number of samples of every shard. Ours are in index.json.
    """
    field_map = {"image": "jpg", "caption": "txt"}
    counts = {shard["url"]: shard["nsamples"] for shard in json.loads((corpus / "index.json").read_text())["shardlist"]}
    for shard, count in counts.items():
        samples = list(webdataset.WebDataset(str(corpus / shard), shardshuffle=False).decode("pil"))
        assert len({sample["__key__"] for sample in samples}) == len(samples) == count
        yield from ((sample[field_map["image"]], sample[field_map["caption"]]) for sample in samples)


def img2dataset(corpus: Path) -> Seen:
    """Tars, tables and stats in step: rows whose status is `success` are the samples of the tar, by key."""
    for stats in sorted(corpus.glob("*_stats.json")):
        shard = stats.name.removesuffix("_stats.json")
        rows = pq.read_table(corpus / f"{shard}.parquet", columns=["key", "caption", "status"]).to_pylist()
        kept = [row for row in rows if row["status"] == "success"]
        assert len(kept) == json.loads(stats.read_text())["successes"]
        with tarfile.open(corpus / f"{shard}.tar") as tar:
            for row in kept:
                yield Image.open(io.BytesIO(tar.extractfile(f"{row['key']}.jpg").read())), row["caption"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a corpus of `tim prepare`")
    given = parser.parse_args()
    for reader in (hugging_face, plain_webdataset, energon, img2dataset):
        found = [(image.size, caption) for image, caption in reader(given.corpus)]
        print(f"{reader.__name__}: {len(found)} samples, first {found[0][0][0]}x{found[0][0][1]}: {found[0][1]}")


if __name__ == "__main__":
    main()
