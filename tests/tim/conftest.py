"""Golden tensors of the reference implementation, and a small network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tim import TransitionTransformer

TINY = {"patch_size": 2, "in_channels": 3, "depth": 2, "hidden_size": 32, "cap_feat_dim": 16, "num_heads": 2, "lora_hidden_size": 8}
TINY_CLASSES = {**{name: value for name, value in TINY.items() if name != "cap_feat_dim"}, "num_classes": 3}


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture
def tiny() -> TransitionTransformer:
    """A network whose every parameter matters: nothing is left at its zero initialisation."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(TINY)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def tiny_classes() -> TransitionTransformer:
    """The same for classes 0 to 2, and 3 for none."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(TINY_CLASSES)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network
