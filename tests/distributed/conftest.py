"""A corpus that is small enough to train on in a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import write_corpus
from launch.distributed.ranks import Ranks, process_group
from tests.distributed import jobs


@pytest.fixture(autouse=True)
def _no_job_outlives_its_test() -> Iterator[None]:
    yield
    jobs.kill_running()


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of the embedded corpus, prepared; only read by the tests."""
    folder = tmp_path_factory.mktemp("figures")
    write_corpus(folder / "source", count=40)
    prepare([str(folder / "source")], out=folder / "corpus", config=PrepareConfig())
    return folder / "corpus"


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """The process group of this process, which is its only rank."""
    with process_group() as ranks:
        yield ranks
