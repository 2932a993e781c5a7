from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.ranks import Ranks, process_group


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """The only process of a training."""
    with process_group() as ranks:
        yield ranks
