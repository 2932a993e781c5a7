"""What was prepared from real corpora is read by the libraries that people have, streaming and not."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import webdataset

from dataprep.checks.verify import verify
from dataprep.prepare import PrepareConfig, prepare
from tests.dataprep.helpers import table_rows


@pytest.fixture(scope="module")
def corpus(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readers") / "C"
    corpora = shared / "corpora"
    sources = [str(corpora / "photos"), str(corpora / "sidecar"), str(corpora / "img2dataset/{00000..00001}.tar")]
    counts = prepare(sources, out=out, config=PrepareConfig.model_validate({"shards": {"max_samples": 200}}), workers=2)
    assert (counts.inputs, counts.kept, counts.shards) == (560, 560, 3)
    assert counts.notes == []
    return out


def check(samples: Iterable[Any], *, corpus: Path, count: int) -> None:
    expected = {row["key"]: row for row in table_rows(corpus)}
    seen = 0
    for sample in samples:
        row = expected[sample["__key__"]]
        assert sample["txt"] == row["caption"]
        assert sample["json"]["sha256"] == row["sha256"]
        assert sample["json"]["captions"] == row["captions"]
        if seen % 50 == 0:
            assert sample["jpg"].size == (row["width"], row["height"])
        seen += 1
    assert seen == count


def test_verify_is_clean(corpus: Path) -> None:
    assert verify(corpus, workers=2).problems == []


def test_webdataset(corpus: Path) -> None:
    shards = f"{corpus}/{{000000..000002}}.tar"
    samples = webdataset.WebDataset(shards, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    check(samples.decode("pil"), corpus=corpus, count=560)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by_folder", [False, True])
def test_datasets(corpus: Path, tmp_path: Path, streaming: bool, by_folder: bool) -> None:
    cache = str(tmp_path / "cache")
    if by_folder:
        loaded = datasets.load_dataset(str(corpus), split="train", streaming=streaming, cache_dir=cache)
    else:
        loaded = datasets.load_dataset("webdataset", data_files=f"{corpus}/*.tar", split="train", streaming=streaming, cache_dir=cache)
    wanted = loaded.take(60) if streaming else loaded
    check(wanted, corpus=corpus, count=60 if streaming else 560)


def test_what_reads_img2datasets_output(corpus: Path) -> None:
    """open_clip's own loader, and counts as people take them from the stats and tables beside the tars."""
    from open_clip_train.data import get_wds_dataset

    stats = [json.loads(path.read_text("utf-8")) for path in sorted(corpus.glob("*_stats.json"))]
    count = sum(each["successes"] for each in stats)
    tables = [pq.read_table(path).to_pylist() for path in sorted(corpus.glob("0?????.parquet"))]
    kept = [row for rows in tables for row in rows if row["status"] == "success"]
    assert (count, len(kept)) == (560, 560)
    settings = Namespace(val_data=f"{corpus}/{{000000..000002}}.tar", val_num_samples=count, batch_size=40, workers=1)
    loader = get_wds_dataset(settings, lambda image: image.size, is_train=False, tokenizer=lambda text: [text]).dataloader
    seen = Counter((caption, *size) for sizes, captions in loader for size, caption in zip(sizes, captions, strict=True))
    assert seen == Counter((row["caption"], row["width"], row["height"]) for row in kept)
