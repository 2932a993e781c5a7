"""Golden tensors of the reference implementation, and a small network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tim.tiny import TINY_CLASSES, tiny_network
from tim import TransitionTransformer


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture
def tiny() -> TransitionTransformer:
    return tiny_network()


@pytest.fixture
def tiny_classes() -> TransitionTransformer:
    """For classes 0 to 2, and 3 for none."""
    return tiny_network(TINY_CLASSES)
