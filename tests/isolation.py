"""Keep what a training leaves in this process from the tests after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from accelerate import PartialState


@contextmanager
def isolated_process() -> Iterator[None]:
    """Restore the environment at the end, and make accelerate forget what it read from it."""
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        PartialState._reset_state()
