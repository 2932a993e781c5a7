"""Load a configuration: read the file and overrides, validate, resolve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from launch.config import yaml_file
from launch.config.recipes import config_path, expand_network_recipe
from launch.config.resolve import resolve
from launch.config.schema import Config

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(source: str | Path | None, *, overrides: Sequence[str] = ()) -> Config:
    """Load the resolved configuration of a training run from a file or a recipe's name, with `key.sub=value` overrides.

    Raises:
        ConfigError: names file, line and key, and the nearest valid key, in one line.
    """
    return complete(yaml_file.read(config_path(source), overrides=overrides))


def complete(raw: yaml_file.RawConfig) -> Config:
    """The resolved configuration of a training run from values that were read or made. Raises ConfigError."""
    raw = expand_network_recipe(raw)
    config = yaml_file.check(raw, Config)
    try:
        return resolve(config)
    except yaml_file.ConfigConflict as conflict:
        raise yaml_file.conflict_error(raw, conflict) from None


def load_settings(source: str | Path | None, *, overrides: Sequence[str] = (), schema: type[Schema]) -> Schema:
    """Load the settings of another command in the same way, without resolving them. Raises ConfigError."""
    return yaml_file.check(yaml_file.read(config_path(source), overrides=overrides), schema)
