"""Golden tensors of the reference implementation, and a small network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tim import TransitionTransformer

TINY = {"patch_size": 2, "in_channels": 3, "depth": 2, "hidden_size": 32, "cap_feat_dim": 16, "num_heads": 2, "lora_hidden_size": 8}


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="session")
def t2i_params(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "meta.json").read_text())["t2i"]["config"]


@pytest.fixture(scope="session")
def t2i_weights(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "t2i_weights.safetensors")


@pytest.fixture
def tiny() -> TransitionTransformer:
    """A network whose every parameter matters: nothing is left at its zero initialisation."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(TINY)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network
