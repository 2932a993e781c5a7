from __future__ import annotations

from collections.abc import Iterator

import pytest

from launch.distributed.ranks import Ranks, process_group
from tests.isolation import isolated_process


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """The only process of a training. What accelerate keeps of it, in the environment and in itself, is forgotten afterwards."""
    with isolated_process(), process_group() as ranks:
        yield ranks
