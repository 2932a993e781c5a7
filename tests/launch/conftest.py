from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.engine import Ranks, process_group


@pytest.fixture(scope="session")
def alone() -> Iterator[Ranks]:
    """The only process of a training; one for all tests, because DeepSpeed keeps the first group that it sees."""
    with process_group() as ranks:
        yield ranks
