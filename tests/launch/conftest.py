from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest

from launch.distributed.ranks import Ranks, process_group


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """The only process of a training. accelerate, which encodes in some of its tests, leaves a RANK in the environment."""
    with mock.patch.dict(os.environ), process_group() as ranks:
        yield ranks
