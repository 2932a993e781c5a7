"""A corpus that is small enough to train on in a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import write_corpus


@pytest.fixture(scope="session")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of the embedded corpus, prepared; only read by the tests."""
    folder = tmp_path_factory.mktemp("figures")
    write_corpus(folder / "source", count=40)
    prepare([str(folder / "source")], out=folder / "corpus", config=PrepareConfig())
    return folder / "corpus"
