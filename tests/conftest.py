"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden tensors and real corpora (environment variable `TIM_SHARED`, default `../shared`)."""
    folder = Path(os.environ.get("TIM_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set TIM_SHARED")
    return folder
