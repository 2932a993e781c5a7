"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

# Before torch is imported: with a thread for each core in each of two processes, all of them wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pipeline.workers.process import start_fork_server
from tests.pipeline.storage.servers import s3_server

RANKS = "tests/distributed/"  # folder of the tests that start several ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start several ranks come first: they take half of the time, and one process at a time runs them."""
    items.sort(key=lambda item: not item.nodeid.startswith(RANKS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`make test` runs two files at a time, but of those that start several ranks only one: they take all cores themselves."""
    from xdist.scheduler import LoadFileScheduling

    class OneFolderOfRanks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return RANKS if nodeid.startswith(RANKS) else super()._split_scope(nodeid)

    return OneFolderOfRanks(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden tensors and real corpora (environment variable `TIM_SHARED`, default `../shared`)."""
    folder = Path(os.environ.get("TIM_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set TIM_SHARED")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """A process has one: it imports what the workers of loaders and of preparations need."""
    start_fork_server("pipeline.loading.pack_reader", "dataprep.examine.examine")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests keep for later calls is not left to the user, nor found by the next session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on an S3 server that stands where the environment says."""
    import s3fs

    urlopen(Request(f"{s3_endpoint}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
