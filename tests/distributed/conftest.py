"""A corpus that is small enough to train on in a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataprep.prepare import PrepareConfig, prepare
from dataprep.synthetic import write_corpus


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """40 pictures of the embedded corpus, prepared."""
    write_corpus(tmp_path / "source", count=40)
    prepare([str(tmp_path / "source")], out=tmp_path / "corpus", config=PrepareConfig())
    return tmp_path / "corpus"
