from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from accelerate import PartialState

from launch.distributed.ranks import Ranks, process_group


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """The only process of a training. What accelerate keeps of it, in the environment and in itself, is forgotten afterwards."""
    with mock.patch.dict(os.environ), process_group() as ranks:
        yield ranks
        PartialState._reset_state()
