"""Recipes: the configurations that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import configs
from launch.config import yaml_file
from launch.config.yaml_file import ConfigConflict, ConfigError, Written


def recipe_names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises ConfigError naming the nearest one."""
    if name not in recipe_names():
        raise ConfigError(f"{name}: neither a file nor a recipe; {yaml_file.nearest_of(name, recipe_names())}")
    return _folder() / f"{name}.yaml"


def config_path(source: str | Path | None) -> Path | None:
    """The file of a configuration, given as a path or as a recipe's name. Raises ConfigError if there is neither."""
    if source is None:
        return None
    path = Path(source)
    if str(source) in recipe_names() and not path.is_file():
        return recipe_path(str(source))  # also beside a folder of this name, as `tim demo` makes one
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a YAML file or a recipe: {', '.join(recipe_names())}")
    return path if path.exists() or path.suffix in (".yaml", ".yml") or path.name != str(source) else recipe_path(str(source))


def expand_network_recipe(written: Written) -> Written:
    """Put the network of `network.recipe` under the written `network.params`. Raises ConfigError for an unknown recipe."""
    network: Any = written.values.get("network")
    if not isinstance(network, dict) or not isinstance(network.get("recipe"), str) or not isinstance(network.get("params", {}), dict):
        return written  # what is wrong with it is for the schema to say
    name = network["recipe"]
    if name not in recipe_names():
        problem = f"{name!r} is no recipe; {yaml_file.nearest_of(name, recipe_names())}"
        raise yaml_file.conflict_error(written, ConfigConflict("network.recipe", problem))
    params = yaml_file.read(recipe_path(name)).values["network"]["params"]
    network["params"] = {**params, **network.get("params", {})}
    return written


def _folder() -> Path:
    return Path(configs.__path__[0])
