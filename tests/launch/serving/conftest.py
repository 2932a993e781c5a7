from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.serving.server import Server, started
from tests.tim.sampling.test_generator import SPEC
from tests.tim.tiny import tiny_network
from tim.model_folder.folder import save_model


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "first" / "model"
    save_model(folder, tiny_network().state_dict(), SPEC)
    return folder


@pytest.fixture(scope="package")
def server(model: Path) -> Iterator[Server]:
    """`tim serve` in a process of its own."""
    with started(model, "--max-side", "300", "--max-steps", "200", "--max-upload", "1", "--requests-per-minute", "1000") as server:
        yield server
