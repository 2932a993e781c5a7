"""Base class and shared types of configuration sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from launch.config.yaml_file import ConfigConflict

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of the configuration. Field docstrings become the user manual."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def check_interval(interval: tuple[float, float]) -> None:
    """Raise ConfigConflict if the interval ends before it starts."""
    if interval[0] > interval[1]:
        raise ConfigConflict("interval", f"{list(interval)} is empty: its start is after its end")
