from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.launch.pulling.hub_server import Hub, hub_server
from tests.launch.pulling.recipes import PARAMS, RECIPE
from tests.tim.models import autoencoder, gemma
from tests.tim.tiny import tiny_network


@pytest.fixture(scope="package")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of a network, a codec and a text encoder."""
    root = tmp_path_factory.mktemp("repositories")
    (root / "authors" / "tim").mkdir(parents=True)
    weights = tiny_network(PARAMS).to_official()
    torch.save({"ema": {f"module.{name}": value for name, value in weights.items()}}, root / "authors" / "tim" / "t2i_model.bin")
    save_file(weights, root / "authors" / "tim" / "model.safetensors")
    autoencoder(root / "authors" / "dc-ae", "dc-ae")
    gemma(root / "maker" / "gemma")
    return root


@pytest.fixture
def hub(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server with a copy of the repositories, and an empty cache. The library reads its settings when it is imported."""
    from huggingface_hub import constants

    with hub_server(Path(shutil.copytree(repositories, tmp_path / "hub"))) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path
