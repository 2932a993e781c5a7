"""Whatever bytes a file has, preparation says what they are: no crash, no hang, no memory without bound.

`make test` tries some hundreds of damaged files of every kind, `make soak` goes on for ten minutes. What once failed stands at the end as
an example of its own.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from dataprep.checks.verify import ShardCheck, check_shard, verify
from dataprep.examine.captions import CaptionConfig
from dataprep.examine.examine import ImageConfig, Piece, Rules, examine_piece
from dataprep.examine.filters import FilterConfig
from dataprep.index_tars import read_foreign
from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.html import ReportConfig, render
from dataprep.report.statistics import compute_statistics, plan_of
from dataprep.row_schema import FILTER_PREFIX, REASONS
from dataprep.sources.open import open_sources
from dataprep.sources.raw_sample import RawSample
from pipeline.corpus.corpus import Corpus, read_manifest
from pipeline.images import DecodedImage, Rejection, encode_image, load_image, read_image
from pipeline.images.headers import careful_size, quick_size
from tests.dataprep.helpers import photo, write_folder
from tests.dataprep.mutations import damaged, images, parquets, tables, tars

MAX_PIXELS = 1 << 20
RULES = Rules(images=ImageConfig(max_decode_pixels=MAX_PIXELS), captions=CaptionConfig(), filters=FilterConfig(), hashes=True)
MAX_MEMORY = 600 << 20  # bytes that a process may grow by, whatever it reads
SOAK_SECONDS = 600


def reads_images(data: bytes) -> None:
    """Decoded as a whole or rejected by name; what is decoded can be stored, and read as training does it; headers say the same size."""
    image = _image(data)
    try:
        size = quick_size(_peek(data), length=len(data)) or careful_size(_peek(data), length=len(data))
    except Rejection:
        size = None
    if image is None:
        return
    height, width = image.pixels.shape[:2]
    assert image.pixels.dtype == np.uint8
    assert image.pixels.shape == (height, width, 3)
    assert 0 < height * width <= MAX_PIXELS
    assert size == (height, width)
    again = read_image(data if image.clean else encode_image(image.pixels, format="jpg"))
    assert again.clean
    assert again.pixels.shape == image.pixels.shape
    resize = (max(1, height // 2), max(1, width // 2))
    assert load_image(data, resize=resize, crop=resize).shape == (*resize, 3)


def _image(data: bytes) -> DecodedImage | None:
    try:
        return read_image(data, max_decode_pixels=MAX_PIXELS)
    except Rejection as rejection:
        _expect_one_line(rejection)
        return None


def _peek(data: bytes) -> Callable[[int, int], bytes]:
    return lambda start, count: data[start : start + count]


def _expect_one_line(error: Exception) -> None:
    assert "\n" not in str(error)


def reads_source(name: str, *, spec: str) -> Callable[[bytes], None]:
    """Every sample of a source whose file `name` has any content can be examined, and nothing is written."""

    def read(data: bytes) -> None:
        with TemporaryDirectory() as temporary:
            folder = write_folder(Path(temporary), {f"{number}.jpg": images()[0] for number in range(2)} | {name: data})
            before = sorted(os.listdir(folder))
            try:
                [source] = open_sources([os.path.join(folder, spec)])
                source.digest()
                _examine_all(source.samples(), limit=len(data) + 2)
                source.notes()
            except (ValueError, RuntimeError) as error:
                _expect_one_line(error)
            assert sorted(os.listdir(folder)) == before

    return read


def indexes_tars(data: bytes) -> None:
    """What lies in a tar has a place in it, or a reason."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.tar"
        path.write_bytes(data)
        found, size = read_foreign(str(path))
        assert size == len(data)
        for row in found.table.to_pylist():
            assert (row["key"] is None) == (row["status"] == "rejected") == bool(row["reason"])
            assert row["key"] is None or 0 <= row["image_offset"] <= row["image_offset"] + row["image_length"] <= size


def reads_corpora(data: bytes) -> None:
    """A corpus with a damaged table: verify names it, a report is refused in one line or drawn of what is there."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, sound in corpus().items():
            (folder / name).write_bytes(sound)
        manifest = read_manifest(folder)
        entry = manifest["shards"][0]
        (folder / entry["table"]).write_bytes(data)
        problems = check_shard(ShardCheck(corpus=folder, entry=entry), lambda position: None)
        assert (data == corpus()[entry["table"]]) == (problems == [])
        assert not any("\n" in problem for problem in problems)
        try:
            census = compute_statistics(Corpus.open(folder), manifest=manifest, plan=plan_of(8, max_tokens=64))
        except ValueError as error:
            _expect_one_line(error)
        else:
            render([census], config=ReportConfig())


@cache
def corpus() -> dict[str, bytes]:
    """The files of a small corpus."""
    with TemporaryDirectory() as temporary:
        folder = write_folder(Path(temporary) / "f", {f"{number}.jpg": photo(number) for number in range(3)} | {"cut.jpg": photo(9)[:99]})
        prepare([str(folder)], out=folder.with_name("C"), config=PrepareConfig.model_validate({"captions": {"required": False}}))
        return {path.name: path.read_bytes() for path in folder.with_name("C").iterdir()}


def _examine_all(samples: Iterable[RawSample], *, limit: int) -> None:
    found = tuple(islice(samples, limit + 1))
    assert len(found) <= limit
    with TemporaryDirectory() as work:
        piece = Piece(samples=found, table=Path(work) / "chunk.arrow", ends_chunk=True, rules=RULES)
        for row in examine_piece(piece, lambda index: None).rows:
            assert row["reason"] in ("", *REASONS) or row["reason"].startswith(FILTER_PREFIX)
            assert row["reason"] or row["width"] * row["height"] <= MAX_PIXELS


def prepares(files: list[bytes], tar: bytes, lines: bytes) -> None:
    """The whole way: an account that adds up, and a corpus that is sound."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = {f"{number}.jpg": data for number, data in enumerate(files)}
        write_folder(folder / "plain", {"good.jpg": photo(5), **{f"sub/{name}": data for name, data in names.items()}})
        write_folder(folder / "listed", {**names, "metadata.jsonl": lines, "t.tar": tar})
        config = PrepareConfig.model_validate({"images": {"max_decode_pixels": MAX_PIXELS}, "captions": {"required": False}})
        sources = [str(folder / "plain"), str(folder / "listed"), str(folder / "listed/t.tar")]
        counts = prepare(sources, out=folder / "C", config=config)
        assert counts.inputs == counts.kept + sum(counts.rejected.values()) >= 1 + len(files)
        assert verify(folder / "C").problems == []
        assert sorted(os.listdir(folder)) == ["C", "listed", "plain"]
        assert not any(path.is_dir() for path in (folder / "C").iterdir())


# Target: what is tried, how often in `make test`, and on what.
TARGETS: dict[str, tuple[Callable[..., None], int, tuple[st.SearchStrategy[Any], ...]]] = {
    "pictures": (reads_images, 200, (damaged(images()),)),
    "tars": (reads_source("t.tar", spec="t.tar"), 60, (damaged(tars()),)),
    "foreign tars": (indexes_tars, 60, (damaged(tars()),)),
    "metadata.jsonl": (reads_source("metadata.jsonl", spec=""), 30, (damaged(tables()),)),
    "metadata.csv": (reads_source("metadata.csv", spec=""), 30, (damaged(tables()),)),
    "metadata.parquet": (reads_source("metadata.parquet", spec=""), 30, (damaged(parquets()),)),
    "sidecar": (reads_source("0.json", spec=""), 20, (damaged(tables()),)),
    "list.jsonl": (reads_source("list.jsonl", spec="list.jsonl"), 30, (damaged(tables()),)),
    "list.csv": (reads_source("list.csv", spec="list.csv"), 30, (damaged(tables()),)),
    "list.parquet": (reads_source("list.parquet", spec="list.parquet"), 40, (damaged(parquets()),)),
    "corpora": (reads_corpora, 40, (st.deferred(lambda: damaged((corpus()["000000.parquet"],))),)),
    "all": (prepares, 2, (st.lists(damaged(images()), max_size=4), damaged(tars()), damaged(tables()))),
}


_UNHEALTHY = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example)


@contextmanager
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_MEMORY


def fuzz(target: str, *, examples: int, number: int) -> None:
    run, _, strategies = TARGETS[target]
    chosen = settings(max_examples=examples, deadline=None, suppress_health_check=_UNHEALTHY, database=None)

    @seed(number)
    @chosen
    @given(st.tuples(*strategies))
    def attempt(drawn: tuple[Any, ...]) -> None:
        run(*drawn)

    with bounded_memory():
        attempt()


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files(target: str) -> None:
    fuzz(target, examples=TARGETS[target][1], number=0)


@pytest.mark.soak
def test_damaged_files_for_ten_minutes() -> None:
    end, number = time.monotonic() + SOAK_SECONDS, 0
    while time.monotonic() < end:
        number += 1
        for target, (_, examples, _) in TARGETS.items():
            fuzz(target, examples=examples, number=number)
