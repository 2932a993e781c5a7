"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.servers import s3_server


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`make test` runs two files at a time, but of those that start several ranks only one: they take all cores themselves."""
    from xdist.scheduler import LoadFileScheduling

    class OneFolderOfRanks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/distributed" if nodeid.startswith("tests/distributed/") else super()._split_scope(nodeid)

    return OneFolderOfRanks(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden tensors and real corpora (environment variable `TIM_SHARED`, default `../shared`)."""
    folder = Path(os.environ.get("TIM_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set TIM_SHARED")
    return folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket on an S3 server that stands where the environment says."""
    import s3fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3_server(port):
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
